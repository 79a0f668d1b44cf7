"""The tests of gcref: see README.md beside this file."""
