"""Images in ArrayRecord files: one ``tf.train.Example`` each, read without TensorFlow.

That is how TensorFlow Datasets writes ImageNet (features ``image`` and ``label``); the
names of its older scripts (``image/encoded``, ``image/class/label``) are known, too.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from google.protobuf.message_factory import GetMessageClass

EXTENSION = ".array_record"
_IMAGES, _LABELS = ("image", "image/encoded"), ("label", "image/class/label")

# The part of tf.train.Example that images need, in protocol buffers' own words.
_DEFINITION = """
name: "images.proto" package: "images" syntax: "proto3"
message_type { name: "Bytes"
  field { name: "value" number: 1 type: TYPE_BYTES label: LABEL_REPEATED } }
message_type { name: "Integers"
  field { name: "value" number: 1 type: TYPE_INT64 label: LABEL_REPEATED } }
message_type { name: "Feature"
  field {
    name: "bytes_list" number: 1 type: TYPE_MESSAGE type_name: ".images.Bytes" }
  field {
    name: "int64_list" number: 3 type: TYPE_MESSAGE type_name: ".images.Integers" } }
message_type { name: "Features"
  field {
    name: "feature" number: 1 type: TYPE_MESSAGE label: LABEL_REPEATED
    type_name: ".images.Features.FeatureEntry" }
  nested_type { name: "FeatureEntry" options { map_entry: true }
    field { name: "key" number: 1 type: TYPE_STRING }
    field { name: "value" number: 2
      type: TYPE_MESSAGE type_name: ".images.Feature" } } }
message_type { name: "Example"
  field {
    name: "features" number: 1 type: TYPE_MESSAGE type_name: ".images.Features" } }
"""


def _example_class() -> Any:
    definition = descriptor_pb2.FileDescriptorProto()
    text_format.Parse(_DEFINITION, definition)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(definition)
    return GetMessageClass(pool.FindMessageTypeByName("images.Example"))


Example = _example_class()


def read_example(record: bytes) -> tuple[bytes, int]:
    """Returns the encoded image of a record and its label.

    Raises:
      google.protobuf.message.DecodeError: if it is no tf.train.Example.
      KeyError: if it has no image, or no label.
      IndexError: if one of them is empty.
    """
    features = Example.FromString(record).features.feature
    image = next((name for name in _IMAGES if name in features), _IMAGES[0])
    label = next((name for name in _LABELS if name in features), _LABELS[0])
    for name in (image, label):
        if name not in features:
            raise KeyError(name)
    return features[image].bytes_list.value[0], features[label].int64_list.value[0]
