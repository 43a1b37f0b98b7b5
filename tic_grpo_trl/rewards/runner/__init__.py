"""Code that runs inside the sandbox's processes, before and around a candidate program. Standard library only.

`sandbox.py` starts it in a fresh interpreter that sees neither site-packages nor the rest of this package.
"""
