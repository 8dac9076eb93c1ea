"""Inputs, oracles and tolerance rules that the tests share."""
