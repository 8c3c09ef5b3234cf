"""The text worker's own side, without its process: jobs and their results."""

import pytest

from meshd.errors import InvalidRequest, ModelFileError
from meshd.models.text.worker.messages import (
    LENGTH,
    EncodeChat,
    Encoded,
    EncodeText,
    Failed,
    Load,
    Loaded,
    decode_job,
    decode_result,
    encode_frame,
)
from meshd.models.text.worker.serve import Worker
from texts.headers import text_header


@pytest.fixture(scope="module")
def worker() -> Worker:
    made = Worker()
    loaded = made.do(Load(model="m", header=text_header(), cpu_s=1))
    assert isinstance(loaded, Loaded)
    return made


def test_jobs_and_results_survive_the_pipe(worker: Worker) -> None:
    for message in (Load(model="m", path="/x", cpu_s=1.5), EncodeText(model="m", text="\u20ac", cpu_s=1)):
        assert decode_job(encode_frame(message)[LENGTH.size :]) == message
    result = worker.do(EncodeText(model="m", text="the fox", cpu_s=1))
    assert decode_result(encode_frame(result)[LENGTH.size :]) == result


def test_a_loaded_model_encodes_texts_and_chats_and_its_table_decodes_them(worker: Worker) -> None:
    loaded = worker.do(Load(model="m", header=text_header(), cpu_s=1))
    assert isinstance(loaded, Loaded)
    text = worker.do(EncodeText(model="m", text="the fox", cpu_s=1))
    chat = worker.do(EncodeChat(model="m", messages=[{"role": "user", "content": "the fox"}], variables={}, cpu_s=1))
    assert isinstance(text, Encoded)
    assert isinstance(chat, Encoded)
    assert loaded.table().decode(text.tokens()) == loaded.table().decode(chat.tokens()) == "the fox"


def test_a_fault_of_the_file_or_the_request_is_a_result(worker: Worker) -> None:
    for job, kind, message in (
        (Load(model="n", header=b"GGUF", cpu_s=1), ModelFileError, "header"),
        (EncodeText(model="nobody", text="a", cpu_s=1), ModelFileError, "not loaded"),
        (EncodeChat(model="m", messages=[], variables={"tools": 1}, cpu_s=1), InvalidRequest, "can't be set"),
    ):
        failed = worker.do(job)
        assert isinstance(failed, Failed)
        assert type(failed.error()) is kind
        assert message in str(failed.error())


def test_a_template_that_refuses_every_conversation_of_one_message_can_be_loaded(worker: Worker) -> None:
    assert isinstance(worker.do(Load(model="n", header=text_header("{{ raise_exception('no') }}"), cpu_s=1)), Loaded)


def test_warnings_of_the_file_come_with_it(worker: Worker) -> None:
    loaded = worker.do(Load(model="n", header=text_header(tokenizer__ggml__bos_token_id=1 << 20), cpu_s=1))
    assert isinstance(loaded, Loaded)
    assert "bos_token_id" in loaded.warnings[0]
