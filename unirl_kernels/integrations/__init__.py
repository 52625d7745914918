"""Where the package meets other libraries. Their objects are recognised by what they look like, not by import."""
