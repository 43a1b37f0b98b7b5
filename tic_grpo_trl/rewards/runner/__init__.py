"""What runs inside the sandbox's process, before and around a candidate program. Standard library only.

`sandbox.py` starts it as a fresh interpreter that sees neither the site-packages nor the rest of this package.
"""
