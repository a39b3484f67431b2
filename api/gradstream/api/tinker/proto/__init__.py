"""Messages of the tinker protobuf wire; wire.proto is the source, tools/generate_proto.py makes the rest."""
