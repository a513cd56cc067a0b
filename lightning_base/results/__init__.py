"""What finished runs left: read, held against itself, and grouped into arms that may be compared.

No training code is imported, so that runs can be read where they were only copied to.
"""
