"""What a server that is ready says to those who would use it."""

import pytest

from gradstream.shared.config import Settings
from gradstream.worker.shift import _ways_in

URL = "http://127.0.0.1:5555"


@pytest.mark.parametrize(
    ("enable_lora", "api_keys_file", "said"),
    [
        (True, None, f"TINKER_BASE_URL={URL} TINKER_API_KEY=tml-anything or XORL_BASE_URL={URL}"),
        (False, None, f"XORL_BASE_URL={URL}"),
        (
            True,
            "keys",
            f"TINKER_BASE_URL={URL} or XORL_BASE_URL={URL} and a key of `gradstream keys add` as TINKER_API_KEY or XORL_API_KEY",
        ),
        (False, "keys", f"XORL_BASE_URL={URL} and a key of `gradstream keys add` as XORL_API_KEY"),
    ],
)
def test_clients_hear_which_variables_lead_to_a_server_that_can_serve_them(enable_lora, api_keys_file, said):
    settings = Settings(model_path="m", enable_lora=enable_lora, api_keys_file=api_keys_file)
    assert _ways_in(settings, URL) == said
