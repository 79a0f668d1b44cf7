"""One adapter per system: a module with a class `Adapter`, imported only in that system's own process."""
