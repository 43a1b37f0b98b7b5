"""How the starter model was made."""
