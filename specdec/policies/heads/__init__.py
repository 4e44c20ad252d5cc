"""Small trained networks that stop a draft, and their files."""
