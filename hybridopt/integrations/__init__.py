"""Thin adapters to training frameworks; each imports its framework only if used."""
