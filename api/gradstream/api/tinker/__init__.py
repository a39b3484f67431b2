"""The Tinker dialect: one file per resource, its bodies beside its routes."""
