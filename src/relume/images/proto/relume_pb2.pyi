from relume.images.proto import pagemap_pb2 as _pagemap_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class relume_pagemap(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[_pagemap_pb2.pagemap_entry]
    def __init__(self, entries: _Optional[_Iterable[_Union[_pagemap_pb2.pagemap_entry, _Mapping]]] = ...) -> None: ...
