"""Plugs for the generation loops of other libraries, each in a module that imports its library."""
