"""Draft models for speculative decoding of continuous tokens."""
