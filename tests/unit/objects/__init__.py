"""The room of objects: values to bytes and back."""
