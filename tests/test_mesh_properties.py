"""Any layer on any mesh is the reference's, or an error tells why not.

``pytest --hypothesis-profile=many tests/test_mesh_properties.py`` draws many more.
"""

from hypothesis import given

from tests import fuzzing


@given(fuzzing.layers(), fuzzing.SEEDS)
def test_a_layer_on_a_mesh_is_that_of_the_reference(layer, seed):
    fuzzing.check(layer, fuzzing.data(seed))
