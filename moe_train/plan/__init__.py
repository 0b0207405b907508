"""Plans before launch: layouts, their legality, parameter counts. Imports no torch."""
