"""Reads the files of offline wandb runs."""

from wandb.proto.wandb_internal_pb2 import Record


BLOCK, HEADER = 32768, 7  # a .wandb file is a LevelDB log, after a header of the same length as its records have


def wandb_records(path):
    """The protocol buffers of an offline run, in order."""
    data, at, record = path.read_bytes(), HEADER, b""
    assert data[:4] == b":W&B"
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # no room for a header: the block's end is padding
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(record)
            record = b""
