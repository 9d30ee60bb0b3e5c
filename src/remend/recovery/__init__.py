"""Recover a degraded student with its healthy reference as teacher: from recipe to report; see job.py."""
