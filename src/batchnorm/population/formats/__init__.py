"""Batch normalization in the files and states of other frameworks: conventions, readers and a writer."""
