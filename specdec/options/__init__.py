"""The caller's options, checked before work starts."""
