"""Errors before any compute: each names the option and the fix."""
