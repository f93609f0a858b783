"""OpenAI's chat completions over a chatbot, as a Starlette application: for serve.py."""

import asyncio
import copy
import json
import logging
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, Literal, NamedTuple

import anyio
import transformers
from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from chatglm.chat import json_arguments, python_call_arguments
from finetuning import chat_rows, encoding

from .chatbot import Chatbot, is_call, text_of
from .flags import is_tool


logger = logging.getLogger("uvicorn.error")

COLDEST = 1e-5  # temperature; divided by less, scores become infinite, and none can be drawn
LONGEST_BODY = 8 * 2**20  # bytes; a million tokens of Chinese are 4 MB
MESSAGES = chat_rows.RowFormat("messages", messages="messages")
Zero = Annotated[float, Field(ge=0, le=0)]


class TextFormat(BaseModel):
    type: Literal["text"]


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """A request of OpenAI's chat completions. What has no effect here is refused, unless it asks for nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**32)
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    n: Literal[1] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logprobs: Literal[False] | None = None
    response_format: TextFormat | None = None
    parallel_tool_calls: bool | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    def options(self) -> dict[str, Any]:
        """What it says about generation, for `generate`; temperature 0 asks for the likeliest token."""
        if self.temperature is not None and self.temperature < COLDEST:
            return {"do_sample": False}
        given = {"temperature": self.temperature, "top_p": self.top_p}
        given = {name: value for name, value in given.items() if value is not None}
        return {**given, "do_sample": True} if given else {}


class Answer(NamedTuple):
    """An answer as far as it has come; `finish` is why it ended, None while it goes on."""

    text: str
    call: dict | None = None
    finish: str | None = None


# ---------------------------------------------------------------------------------------------------------- answers


def up_to_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the first of the stop strings in it, and whether there is one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def settled(text: str, stops: list[str]) -> str:
    """The text without an end that the next tokens may turn into a stop string."""
    ends = [size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
    return text[: len(text) - max(ends, default=0)]


def call_in(message: dict) -> dict | None:
    """The call of a tool in an answer, as OpenAI writes it; None where there is none that can be read."""
    if not is_call(message):
        return None
    arguments = json_arguments(message["content"])  # GLM-4's way; ChatGLM3 writes Python
    arguments = python_call_arguments(message["content"]) if arguments is None else arguments
    if arguments is None:
        return None
    function = {"name": message["metadata"], "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def prompt_of(asked: ChatRequest, tokenizer) -> list[int]:
    """Ids of the conversation up to the cue for an answer, as in training. Raises ValueError for what is none."""
    if not all(map(is_tool, asked.tools or [])):
        raise ValueError("tools: each must be an object with a function that has a name.")
    row = {"messages": asked.messages, "tools": asked.tools if asked.tool_choice != "none" else None}
    messages = chat_rows.conversation(row, MESSAGES, "request", questions_only=True)
    if messages[-1]["role"] not in ("user", "observation"):
        raise ValueError("request: the last message must be a question (user) or the result of a tool (tool).")
    empty = [number for number, message in enumerate(messages, 1) if message["content"] is None]
    if empty:
        raise ValueError(f"request: message {empty[0]} has no content.")
    return encoding.prompt_ids(tokenizer, chat_rows.split_where_refused(messages, tokenizer))


# ------------------------------------------------------------------------------------------------------- the server


class Server:
    """OpenAI's interface to a chatbot, for clients that bring `key`, if there is one.

    Answers are made one after the other; meanwhile at most `longest_queue` requests wait. `longest_prompt` is in
    tokens, None for what the model has room for.
    """

    def __init__(
        self, bot: Chatbot, name: str, key: str | None, longest_queue: int, longest_prompt: int | None = None
    ):
        self.bot, self.name, self.key = bot, name, key
        self.longest_queue, self.longest_prompt = longest_queue, longest_prompt
        self.tokenizer = copy.deepcopy(bot.tokenizer)  # the bot's own decodes in another thread
        self.turn, self.reading = asyncio.Lock(), asyncio.Lock()
        self.present, self.started = 0, int(time.time())

    def app(self, hosts: tuple[str, ...] | None) -> Starlette:
        """The application; requests under other names than `hosts`, as of a page elsewhere, are refused."""
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self.completion, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.models),
            ],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))] if hosts else [],
            exception_handlers={HTTPException: refusal},
        )

    def check_key(self, request: Request):
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key and not secrets.compare_digest(given.encode(), self.key.encode()):
            raise HTTPException(401, "The API key is missing or wrong: Authorization: Bearer KEY.")

    async def models(self, request: Request) -> Response:
        self.check_key(request)
        model = {"id": self.name, "object": "model", "created": self.started, "owned_by": "user"}
        if "name" not in request.path_params:
            return JSONResponse({"object": "list", "data": [model]})
        self.check_name(request.path_params["name"])
        return JSONResponse(model)

    def check_name(self, name: str):
        if name != self.name:
            raise HTTPException(404, f"The model {name!r} is not served here, but {self.name!r} is.")

    async def completion(self, request: Request) -> Response:
        """What is answered, a refusal, or that something failed here; Starlette itself would close the connection."""
        try:
            return await self.completed(request)
        except HTTPException:
            raise
        except Exception as error:
            raise failed("A request", error) from error

    async def completed(self, request: Request) -> Response:
        self.check_key(request)
        try:
            asked = ChatRequest.model_validate_json(await body_of(request))
        except ValidationError as error:
            first = error.errors()[0]
            raise HTTPException(400, f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}") from error
        self.check_name(asked.model)
        async with self.reading:  # megabytes take seconds, in which others get their answers
            bot, ids = await run_in_threadpool(self.prepared, asked)
        if self.present > self.longest_queue:
            raise HTTPException(429, f"{self.longest_queue} requests are waiting already: try again later.")
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        answers = self.answers(request, asked, bot, ids)
        if asked.stream:
            first = await anext(answers, Answer("", finish="stop"))
            usage = bool(asked.stream_options and asked.stream_options.include_usage)
            events = streamed(first, answers, {**head, "object": "chat.completion.chunk"})
            return StreamingResponse(server_sent(events, bot, ids, usage), media_type="text/event-stream")
        answer = Answer("", finish="stop")
        async for newer in answers:
            answer = newer
        message = {"role": "assistant", "content": answer.text}
        if answer.call:
            message |= {"content": None, "tool_calls": [answer.call]}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish, "logprobs": None}
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage_of(bot, ids)})

    def prepared(self, asked: ChatRequest) -> tuple[Chatbot, list[int]]:
        """A chatbot with the options of a request, and its prompt. Raises HTTPException for what is not possible."""
        tools = asked.tools if asked.tool_choice != "none" else None
        most, length = self.bot.options["max_new_tokens"], asked.max_completion_tokens or asked.max_tokens
        if length and length > most:
            raise HTTPException(400, f"max_tokens: {length} is more than the server makes, {most} (--max_new_tokens).")
        try:
            bot = Chatbot(self.bot.model, self.bot.tokenizer, {**self.bot.options, **asked.options()}, tools)
            ids = prompt_of(asked, self.tokenizer)
        except (ValueError, TemplateError) as error:
            raise HTTPException(400, str(error)) from error
        room = bot.positions - len(ids) if bot.positions else most
        if len(ids) > (self.longest_prompt or len(ids)):
            most = f"{self.longest_prompt} (--max_prompt_tokens)"
            raise HTTPException(400, f"The messages are {len(ids)} tokens long, more than the server takes, {most}.")
        if room < (length or 1):
            most = f"{bot.positions} positions, and the answer wants {length or 1}"
            raise HTTPException(400, f"The messages are {len(ids)} tokens long. The model has {most}: shorten them.")
        bot.options["max_new_tokens"] = length or min(most, room)
        return bot, ids

    async def answers(self, request: Request, asked: ChatRequest, bot: Chatbot, ids: list[int]):
        """The `Answer`, again and again until it has a `finish`; nothing where nobody waits for it any more.

        Raises HTTPException where the model fails.
        """
        stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        self.present += 1
        try:
            async with self.turn:
                if asked.seed is not None:
                    transformers.set_seed(asked.seed)
                messages, message, stopped = bot.answer(ids), {"role": "assistant", "content": ""}, False
                try:
                    while not stopped and (new := await run_in_threadpool(next, messages, None)):
                        if await request.is_disconnected():
                            return
                        message = new
                        text, stopped = up_to_stop(text_of(message), stops)
                        if not bot.tools:  # an answer may turn out to be a call, at its end
                            yield Answer(settled(text, stops))
                finally:
                    with anyio.CancelScope(shield=True):  # the next answer waits until this one's thread has ended
                        await run_in_threadpool(messages.close)
            text, _ = up_to_stop(text_of(message), stops)
            call = call_in(message)
            ended = stopped or bot.reply[-1] in bot.options["eos_token_id"]
            yield Answer(text, call, "tool_calls" if call else "stop" if ended else "length")
        except Exception as error:  # of any library, such as lack of memory
            raise failed("An answer", error) from error
        finally:
            self.present -= 1


async def body_of(request: Request) -> bytes:
    """The body of a request of the type that a page elsewhere cannot send unasked."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "The body must be JSON, of the type application/json.")
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > LONGEST_BODY:
            raise HTTPException(413, f"The request is longer than {LONGEST_BODY} bytes.")
    return body


def usage_of(bot: Chatbot, ids: list[int]) -> dict[str, int]:
    made = len(bot.reply)
    return {"prompt_tokens": len(ids), "completion_tokens": made, "total_tokens": len(ids) + made}


async def streamed(first: Answer, answers: AsyncIterator[Answer], head: dict) -> AsyncIterator[dict]:
    """The chunks of an answer, each with what is new in it."""

    def chunk(delta, finish=None):
        return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]}

    async with aclosing(answers):
        yield chunk({"role": "assistant", "content": ""})
        answer, sent = first, ""
        while answer:
            if answer.call:
                yield chunk({"tool_calls": [{"index": 0, **answer.call}]})
            elif answer.text.startswith(sent) and answer.text != sent:
                yield chunk({"content": answer.text[len(sent) :]})
                sent = answer.text
            if answer.finish:
                yield chunk({}, answer.finish)
                return
            answer = await anext(answers, None)


async def server_sent(chunks: AsyncIterator[dict], bot: Chatbot, ids: list[int], usage: bool) -> AsyncIterator[str]:
    """The chunks as server-sent events; an error is one too, for the response has begun."""
    last = {}
    try:
        async with aclosing(chunks):
            async for last in chunks:
                yield f"data: {json.dumps(last, ensure_ascii=False)}\n\n"
    except HTTPException as error:
        yield f"data: {json.dumps(error_body(error.status_code, error.detail))}\n\n"
        return
    if usage:
        yield f"data: {json.dumps({**last, 'choices': [], 'usage': usage_of(bot, ids)})}\n\n"
    yield "data: [DONE]\n\n"


def failed(what: str, error: Exception) -> HTTPException:
    """What a client hears of a failure, whose traceback the log has."""
    logger.exception(f"{what} failed", exc_info=error)
    return HTTPException(500, f"{type(error).__name__}: see the log of the server.")


def error_body(status: int, text: str) -> dict:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": text, "type": kind, "param": None, "code": None}}


async def refusal(request: Request, error: HTTPException) -> Response:
    return JSONResponse(error_body(error.status_code, error.detail), error.status_code, error.headers)
