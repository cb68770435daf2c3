"""Readers that turn a data set, as published, into one manifest."""
