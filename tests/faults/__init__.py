"""Every kind of fault, provoked in random surroundings: a named error, and nothing lost."""
