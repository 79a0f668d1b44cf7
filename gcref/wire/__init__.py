"""What parties say to each other, and how it is written down. The specification is README.md beside this file.

    codec      plain values ↔ msgpack; packets (the frames of a session) ↔ bytes
    messages   the kinds of messages, their shapes, and the check of a received one

Nothing in here does I/O or keeps state, and nothing that arrives is ever unpickled here.
"""
