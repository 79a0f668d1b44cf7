"""Objects: values ↔ blobs, references, functions as bytes, failures.

    ref         the address of an object
    blob        the layout of its bytes
    serialize   values and calls ↔ blobs: the front of this room
    failure     exceptions ↔ what crosses the wire

    functions   functions as bytes, by digest        notes     futures found while pickling
    pickling    plain pickle, cloudpickle, arrays, and telling what went wrong

Nothing is imported here: who takes a reference apart does not load the picklers.
"""
