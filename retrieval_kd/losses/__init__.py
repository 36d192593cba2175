"""Losses as pure tensor functions, on scores [B, N] with a mask and on representations."""
