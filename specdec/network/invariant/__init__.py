"""Forwards that give a token the same bits however many are computed with it."""
