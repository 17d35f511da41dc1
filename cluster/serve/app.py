"""The HTTP side of `rstar serve`: the OpenAI API, health, tree pages and a page for people.

    POST /v1/chat/completions, /v1/completions   streamed (server-sent events) or not
    GET  /v1/models, /v1/models/NAME
    GET  /health   this process answers          GET /ready   it can search now; else 503 and why
    GET  /         the page for people           GET /trees/SECRET   a search that was answered

Every error is the API's own object. A connection that closes cancels its handler, and with it its
searches. With API keys every request under /v1 needs one; without, the server listens on the
loopback only and answers only requests for a loopback name with a JSON body, so that no web page
of another site can use it. The address of a tree page is its key: nobody can guess it, and it shows
one search to whom it is given.

What is asked and answered is in no log unless the config says so.

Not covered: encryption; put a proxy in front (docs/serve.md).
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from cluster.reports.marked_tree import TreeView
from cluster.reports.tree_page import render_page
from cluster.serve.api import ApiError, Asked, model_names, read_model, read_request
from cluster.serve.config import ServeConfig
from cluster.serve.keys import Keys
from cluster.serve.replies import Answer, Reply, Thinking
from cluster.serve.service import BusyError, NeverBegunError, Service, StoppingError
from cluster.telemetry import metrics
from cluster.watch.dashboard import is_loopback
from rollout.engine import EngineError
from rollout.methods import Ending, Event, SolveResult
from rollout.search import SearchError
from rollout.tasks import all_of
from rollout.tree import Tree
from verifier import SandboxError

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 15.0
"""A stream is silent for no longer, so that no proxy closes it."""

_PAGE = Path(__file__).with_name("page.html")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Tell = Callable[[str], None]

REQUEST_ID = web.RequestKey("id", str)
KEY_NAME = web.RequestKey("key", str)
"""Whose API key it came with; "" without."""

CREATED = int(time.time())


class Server:
    """See the module."""

    def __init__(
        self,
        service: Service,
        config: ServeConfig,
        keys: Keys,
        why_not_ready: Callable[[], str] = lambda: "",
    ) -> None:
        """
        Args:
            why_not_ready: "" if searches can begin.
        """
        self.service = service
        self.config = config
        self.keys = keys
        self._why_not_ready = why_not_ready
        self._stopping = False
        self._trees: OrderedDict[str, Tree] = OrderedDict()

    async def stop(self) -> None:
        """Be not ready and take nothing new, and let what is in hand end."""
        self._stopping = True
        await self.service.stop()

    def app(self) -> web.Application:
        """The application; to be run with `handler_cancellation`."""
        app = web.Application(
            middlewares=[self._guard], client_max_size=self.config.serve.max_request_kib * 1024
        )
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completion)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{name}", self._model)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/trees/{secret}", self._tree)
        app.router.add_get("/", self._page)
        return app

    # ---------------------------------------------------------------- guard

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        request[REQUEST_ID] = secrets.token_hex(12)
        try:
            self._let_in(request)
            response = await handler(request)
        except ApiError as error:
            response = _error_response(error)
        except web.HTTPRequestEntityTooLarge:
            most = self.config.serve.max_request_kib
            said = f"the body has more than {most} KiB"
            response = _error_response(ApiError(413, said, code="request_too_large"))
        except web.HTTPException as refusal:
            if refusal.status < 400:
                raise
            said = f"{request.method} {request.path}: {refusal.reason}"
            response = _error_response(ApiError(refusal.status, said))
        if not response.prepared:
            response.headers["X-Request-Id"] = request[REQUEST_ID]
        return response

    def _let_in(self, request: web.Request) -> None:
        """
        Raises:
            ApiError: not to be answered.
        """
        request[KEY_NAME] = ""
        if request.path in ("/health", "/ready"):
            return
        if not self.keys:
            if not is_loopback(urlsplit(f"//{request.host}").hostname or ""):
                raise ApiError(403, "this server answers its own machine only")
            if request.method == "POST" and request.content_type != "application/json":
                raise ApiError(415, "the content type must be application/json")
            return
        if not request.path.startswith("/v1/"):
            return
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        name = self.keys.name_of(key.strip()) if scheme.lower() == "bearer" else None
        if name is None:
            metrics.count(metrics.SERVE_REQUESTS, method="none", outcome="unauthorised")
            raise ApiError(
                401,
                "no API key that is known here; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                kind="authentication_error",
            )
        request[KEY_NAME] = name

    # ---------------------------------------------------------------- small ones

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _ready(self, request: web.Request) -> web.Response:
        why = "the server is stopping" if self._stopping else self._why_not_ready()
        standing = self.service.standing
        said = {"running": standing.running, "waiting": standing.waiting}
        if why:
            return web.json_response({"status": "not ready", "why": why, **said}, status=503)
        return web.json_response({"status": "ready", **said})

    async def _models(self, request: web.Request) -> web.Response:
        listed = [_model_object(name) for name in model_names(self.config)]
        return web.json_response({"object": "list", "data": listed})

    async def _model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        read_model(name, self.config)
        return web.json_response(_model_object(name))

    async def _page(self, request: web.Request) -> web.Response:
        nonce = secrets.token_urlsafe(12)
        text = _PAGE.read_text(encoding="utf-8").replace("<script>", f'<script nonce="{nonce}">')
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; "
            "connect-src 'self'; frame-src 'self'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )
        return _html(text, policy)

    async def _tree(self, request: web.Request) -> web.Response:
        tree = self._trees.get(request.match_info["secret"])
        if tree is None:
            raise ApiError(404, "no such tree; the last searches are kept for a while")
        view = TreeView(
            tree=tree,
            others=(tree,),
            chosen=(),
            pairs=(),
            held_out=True,  # nothing is trained on what users ask
            ppm_only=False,
        )
        return _html(await asyncio.to_thread(render_page, view), "frame-ancestors 'self'")

    # ---------------------------------------------------------------- answers

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._counted(request, chat=True)

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        return await self._counted(request, chat=False)

    async def _counted(self, request: web.Request, *, chat: bool) -> web.StreamResponse:
        """Answer, and count and log how that ended."""
        began_s = time.monotonic()
        asked: Asked | None = None
        outcome = "failed"
        try:
            asked = read_request(await request.read(), self.config, chat=chat)
            response, outcome = await self._answer(request, asked, began_s)
            return response
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except (ApiError, web.HTTPRequestEntityTooLarge):
            outcome = "invalid"
            raise
        except Exception as error:
            told = _explained(error, request[REQUEST_ID])
            outcome = told.outcome
            raise told from error
        finally:
            method = asked.method if asked is not None else "none"
            metrics.count(metrics.SERVE_REQUESTS, method=method, outcome=outcome)
            logger.info(
                "A request ended: %s request=%s key=%s method=%s seconds=%.3f%s",
                outcome,
                request[REQUEST_ID],
                request[KEY_NAME] or "-",
                method,
                time.monotonic() - began_s,
                f" problem={asked.asks[0].problem.text!r}"
                if asked is not None and self.config.serve.log_requests
                else "",
            )

    async def _answer(
        self, request: web.Request, asked: Asked, began_s: float
    ) -> tuple[web.StreamResponse, str]:
        """The response and its outcome."""
        user = (request[KEY_NAME] or request.remote or "", asked.user)
        prefix = "chatcmpl" if asked.chat else "cmpl"
        reply = Reply(asked=asked, id=f"{prefix}-{request[REQUEST_ID]}")

        async def choice(index: int, tell: Tell) -> Answer:
            thinking = Thinking()
            told = False

            def on_event(event: Event) -> None:
                nonlocal told
                more = thinking.more(event)
                if more and not told:
                    told = True
                    first_s = time.monotonic() - began_s
                    metrics.observe(metrics.SERVE_FIRST_STEP, first_s, method=asked.method)
                if more:
                    tell(more)

            result = await self.service.solve(tickets[index], asked.asks[index], on_event)
            return Answer(
                result=result, thinking=thinking.text, tree=self._keep_tree(request, result)
            )

        with self.service.admitted(user, len(asked.asks)) as tickets:
            if asked.stream:
                response, answers = await self._stream(request, reply, choice)
            else:
                answers = await all_of(
                    choice(index, lambda text: None) for index in range(len(asked.asks))
                )
                response = web.json_response(reply.completion(answers))
        if isinstance(answers, ApiError):
            return response, answers.outcome
        self._count(asked, answers, began_s)
        late = any(answer.result.ended is Ending.TIME for answer in answers)
        return response, "late" if late else "ok"

    async def _stream(
        self,
        request: web.Request,
        reply: Reply,
        choice: Callable[[int, Tell], Awaitable[Answer]],
    ) -> tuple[web.StreamResponse, list[Answer] | ApiError]:
        """Answer in pieces as they come; what went wrong is told in the stream."""
        asked = reply.asked
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",
                "X-Request-Id": request[REQUEST_ID],
            }
        )
        await response.prepare(request)
        chunks: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

        async def one(index: int) -> Answer:
            chunks.put_nowait(reply.first(index))
            answer = await choice(index, lambda text: chunks.put_nowait(reply.thought(index, text)))
            for chunk in reply.last(index, answer):
                chunks.put_nowait(chunk)
            return answer

        async def all_choices() -> list[Answer] | ApiError:
            try:
                answers = await all_of(one(index) for index in range(len(asked.asks)))
                if asked.include_usage:
                    chunks.put_nowait(reply.usage(answers))
                return answers
            except Exception as error:
                told = _explained(error, request[REQUEST_ID])
                chunks.put_nowait(told.body)
                return told
            finally:
                chunks.put_nowait(None)

        searching = asyncio.create_task(all_choices())
        try:
            while (chunk := await _next_chunk(chunks, response)) is not None:
                if asked.include_usage and "choices" in chunk:
                    chunk.setdefault("usage", None)
                await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
            answers = await searching
            await response.write(b"data: [DONE]\n\n")
            await response.write_eof()
            return response, answers
        finally:
            searching.cancel()
            await asyncio.gather(searching, return_exceptions=True)

    def _count(self, asked: Asked, answers: list[Answer], began_s: float) -> None:
        took_s = time.monotonic() - began_s
        metrics.observe(metrics.SERVE_ANSWER, took_s, method=asked.method)
        for answer in answers:
            cost = answer.result.cost
            for kind, tokens in (
                ("generated", cost.generated_tokens),
                ("prompt", cost.prompt_tokens),
                ("cached", cost.cached_tokens),
                ("scored", cost.scored_tokens),
            ):
                metrics.count(metrics.SERVE_TOKENS, tokens, method=asked.method, kind=kind)

    def _keep_tree(self, request: web.Request, result: SolveResult) -> str | None:
        """Keep the tree of the answer for a while; returns the address of its page."""
        most = self.config.serve.kept_trees
        if not result.trees or not most:
            return None
        chosen = result.chosen
        own = (t for t in result.trees if chosen is not None and t.seed == chosen.seed)
        secret = secrets.token_urlsafe(18)
        self._trees[secret] = next(own, result.trees[0])
        while len(self._trees) > most:
            self._trees.popitem(last=False)
        site = self.config.serve.public_url or f"{request.scheme}://{request.host}"
        return f"{site.rstrip('/')}/trees/{secret}"


async def _next_chunk(
    chunks: asyncio.Queue[dict[str, Any] | None], response: web.StreamResponse
) -> dict[str, Any] | None:
    """What there is to send next; while there is nothing, the connection is kept alive."""
    while True:
        try:
            async with asyncio.timeout(KEEP_ALIVE_S):
                return await chunks.get()
        except TimeoutError:
            await response.write(b": still thinking\n\n")


def _explained(error: Exception, request_id: str) -> ApiError:
    """What a client is told of a failure; nothing of the inside of the server."""
    if isinstance(error, StoppingError | NeverBegunError):
        after_s = error.retry_after_s if isinstance(error, NeverBegunError) else 1
        return ApiError(
            503, str(error), code="overloaded", kind="server_error", retry_after_s=after_s
        )
    if isinstance(error, BusyError):
        return ApiError(
            429,
            str(error),
            code="rate_limit_exceeded",
            kind="rate_limit_error",
            retry_after_s=error.retry_after_s,
        )
    part_failed = isinstance(error, EngineError | SandboxError | SearchError)
    logger.error("A request failed request=%s", request_id, exc_info=error)
    what = "a part of the server failed again and again" if part_failed else "the server failed"
    return ApiError(500, f"{what}, request {request_id}", code="failed", kind="server_error")


def _error_response(error: ApiError) -> web.Response:
    after = error.retry_after_s
    headers = {} if after is None else {"Retry-After": str(after)}
    return web.json_response(error.body, status=error.status, headers=headers)


def _html(text: str, policy: str) -> web.Response:
    headers = {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }
    return web.Response(text=text, content_type="text/html", headers=headers)


def _model_object(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": CREATED, "owned_by": "rstar"}
