"""A live server, from the command line to the batch, under clients of every kind."""

import json

from benchmarks.soak import main


def test_no_request_to_a_live_server_is_lost_or_answered_wrongly(capfd):
    main(["--requests", "40", "--prompts", "2", "--clients", "6"])
    found = json.loads(capfd.readouterr().out)
    assert found["wrong"] == [] and found["lost"] == [] and found["exit"] == 0
    assert found["requests"] == 40 and found["right"] > 15 and found["parted"] <= 1
