"""What the caller chose, checked before work starts."""
