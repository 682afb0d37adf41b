"""Homes for the teacher in other libraries."""
