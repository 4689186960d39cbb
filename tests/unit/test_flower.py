"""What this app takes of Flower beyond its public API is as it was; a failure says what is not."""

import ast
import logging
import re
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict
from flwr.proto.message_pb2 import PushObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf

from configuration.flower import (
    ObjectPushError,
    Run,
    TaskIdentity,
    flatten_dict,
    log,
    parse_config_args,
)
from tests.conftest import ROOT

PUBLIC = re.compile(r"flwr(\.app|\.clientapp|\.serverapp(\.strategy)?|\.simulation)?")
PARTS = (
    "benchmarks",
    "client_app",
    "configuration",
    "deploy",
    "server_app",
    "simulation",
    "strategies",
)


def imported(file: Path) -> set[str]:
    """The modules that a file imports."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = {each.name for node in nodes if isinstance(node, ast.Import) for each in node.names}
    return names | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def test_flowers_private_modules_are_imported_in_one_file() -> None:
    files = [file for part in PARTS for file in (ROOT / part).rglob("*.py")]
    private = {
        (str(file.relative_to(ROOT)), name)
        for file in files
        for name in imported(file)
        if name.startswith("flwr") and not PUBLIC.fullmatch(name)
    }
    # Flower's own mean is what a benchmark compares with.
    private -= {("benchmarks/aggregation.py", "flwr.serverapp.strategy.strategy_utils")}
    # Which runs in the SuperNode's process, where this program's modules are not.
    private -= {
        ("deploy/supernode.py", "flwr.supercore.run"),
        ("deploy/supernode.py", "flwr.supernode"),
    }
    assert {file for file, _ in private} == {"configuration/flower.py"}


def test_a_run_configuration_is_parsed_as_on_flowers_command_line() -> None:
    text = 'strategy="gsgm" gsgm.window=5 training.lr=0.1 wire.sealing="off" results.details=true'
    expected = {
        "strategy": "gsgm",
        "gsgm.window": 5,
        "training.lr": 0.1,
        "wire.sealing": "off",
        "results.details": True,
    }
    assert parse_config_args([text]) == expected, "parse_config_args reads pairs in another way"


def test_tables_are_flattened_by_dots() -> None:
    assert flatten_dict({"a": {"b": 1}, "c": 2}) == {"a.b": 1, "c": 2}, "flatten_dict changed"


def test_flowers_logger_is_the_one_whose_lines_a_run_streams(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log(logging.WARNING, "%s of %d", "one", 2)
    assert ("flwr", logging.WARNING, "one of 2") in caplog.record_tuples, "log goes elsewhere"


def test_messages_take_their_run_and_source_from_the_task() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 8, 9
    try:
        metadata = Message(RecordDict(), dst_node_id=1, message_type="train").metadata
        found = metadata.run_id, metadata.src_node_id
    finally:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    assert found == (7, 8), "TaskIdentity no longer says whose messages a process makes"


def test_the_parts_of_a_message_that_only_flower_sets_can_be_set() -> None:
    """As the virtual grid does, in which no SuperLink signs."""
    message = Message(RecordDict(), dst_node_id=1, message_type="train")
    message.metadata.__dict__["_message_id"] = "one"
    message.metadata.__dict__["_src_node_id"] = 5
    assert message.metadata.message_id == "one", "Metadata keeps its message's number elsewhere"
    assert message.metadata.src_node_id == 5, "Metadata keeps its source elsewhere"


def test_a_run_without_an_app_can_be_made() -> None:
    """As the virtual grid has one."""
    assert Run.create_empty(run_id=3).run_id == 3, "Flower's Run is made in another way"


def test_what_a_superlink_does_not_store_is_an_error_of_its_own() -> None:
    """As after it was killed while it took a message: then that is pushed anew."""
    push = make_push_object_fn_protobuf(
        lambda request: PushObjectResponse(stored=False), Node(), run_id=1, session_id=""
    )
    with pytest.raises(ObjectPushError):
        push("object", b"")
