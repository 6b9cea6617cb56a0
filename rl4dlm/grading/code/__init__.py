"""Grading of programs: which code a completion means, what is asked of it, and whether the answers are right."""
