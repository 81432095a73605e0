"""The node's HTTP API on its unix socket: each route is one verb of :class:`Node`, in and out as JSON.

Verbs that take long answer a stream of JSON lines, ``{"progress": text}`` until one ``{"result": ...}`` or
``{"error": ...}``. They run to their end even if the caller hangs up.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from relume.errors import BadRequest, Conflict, NotFound, RelumeError
from relume.node.agent import Node
from relume.node.logs import follow

log = logging.getLogger(__name__)

NODE: web.AppKey[Node] = web.AppKey("node", Node)

Progress = Callable[[str], None]
routes = web.RouteTableDef()


def application(node: Node) -> web.Application:
    """The whole API."""
    app = web.Application(middlewares=[_errors], client_max_size=16 << 20)
    app[NODE] = node
    app.add_routes(routes)
    return app


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except RelumeError as error:
        return web.json_response({"error": error.as_dict()}, status=_status(error))
    except ConnectionResetError:
        return web.Response(status=499)  # the caller hung up before anything was said; nobody reads this
    except web.HTTPException as error:
        body = {"code": "bad_request", "message": error.reason, "hint": ""}
        return web.json_response({"error": body}, status=error.status)
    except Exception as error:
        log.exception("%s %s", request.method, request.path)
        return web.json_response({"error": _internal(error)}, status=500)


def _status(error: RelumeError) -> int:
    match error:
        case NotFound():
            return 404
        case BadRequest():
            return 400
        case Conflict():
            return 409
        case _:
            return 500


def _internal(error: Exception) -> dict[str, Any]:
    return {
        "code": "internal",
        "message": f"{type(error).__name__}: {error}",
        "hint": "the node's own log has more",
    }


_LOOK_AT_CALLER = 0.5
"""Seconds between two looks whether a caller to whom there is nothing to say is still there."""


async def _stream(
    request: web.Request, verb: Callable[[Progress], Awaitable[Any]], *, goes_on: bool = True
) -> web.StreamResponse:
    """Run ``verb`` and stream what it says. If the caller goes away it ``goes_on``, or is cancelled."""
    response = web.StreamResponse(headers={"content-type": "application/x-ndjson"})
    await response.prepare(request)
    lines: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    async def run() -> None:
        try:
            lines.put_nowait({"result": await verb(lambda text: lines.put_nowait({"progress": text}))})
        except RelumeError as error:
            lines.put_nowait({"error": error.as_dict()})
        except Exception as error:
            log.exception("%s", request.path)
            lines.put_nowait({"error": _internal(error)})
        lines.put_nowait(None)

    running = request.app[NODE].background.spawn(run())
    try:
        while (line := await _next(request, lines)) is not None:
            await response.write(json.dumps(line).encode() + b"\n")
    except ConnectionError:  # aiohttp's plain one where it waited for a slow reader
        if not goes_on:
            running.cancel()
    return response


async def _next(request: web.Request, lines: asyncio.Queue[dict[str, Any] | None]) -> dict[str, Any] | None:
    """The next line. Raises ConnectionResetError when the caller hangs up, also where nothing is said."""
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_AT_CALLER):
                return await lines.get()
        if request.transport is None or request.transport.is_closing():
            raise ConnectionResetError


async def _body(request: web.Request) -> dict[str, Any]:
    if not request.can_read_body:
        return {}
    try:
        body = await request.json()
    except ValueError:
        raise BadRequest("the body is not JSON") from None
    if not isinstance(body, dict):
        raise BadRequest("the body is not a JSON object")
    return body


@routes.get("/v1/status")
async def _get_status(request: web.Request) -> web.Response:
    return web.json_response(request.app[NODE].status())


@routes.post("/v1/deploy")
async def _deploy(request: web.Request) -> web.StreamResponse:
    body = await _body(request)
    node = request.app[NODE]

    async def verb(progress: Progress) -> dict[str, Any]:
        began = asyncio.get_running_loop().time()
        config_file = body.get("config_file")
        deployed = await node.deploy(
            Path(body["directory"]),
            config_file=Path(config_file) if config_file else None,
            name=body.get("name"),
            fresh=bool(body.get("fresh")),
            progress=progress,
        )
        seconds = asyncio.get_running_loop().time() - began
        return deployed.as_dict() | {"seconds": round(seconds, 3)}

    if not isinstance(body.get("directory"), str):
        raise BadRequest("directory is missing")
    return await _stream(request, verb, goes_on=False)


@routes.post("/v1/apps/{app}/start")
async def _start(request: web.Request) -> web.StreamResponse:
    body = await _body(request)
    node, app = request.app[NODE], request.match_info["app"]
    environment = body.get("env") or {}
    if not all(isinstance(value, str) for value in environment.values()):
        raise BadRequest("env maps names to strings")

    async def verb(progress: Progress) -> dict[str, Any]:
        if body.get("explain"):
            return await node.explain_start(app)
        return (
            await node.start(
                app,
                restore=bool(body.get("restore", True)),
                environment=environment,
                memory=str(body.get("memory", "paged")),
            )
        ).as_dict()

    return await _stream(request, verb)


@routes.post("/v1/stop")
async def _stop(request: web.Request) -> web.Response:
    body = await _body(request)
    return web.json_response({"stopped": await request.app[NODE].stop(str(body.get("target", "")))})


@routes.get("/v1/instances")
async def _instances(request: web.Request) -> web.Response:
    return web.json_response(request.app[NODE].instances())


@routes.post("/v1/instances/{instance}/explain")
async def _explain(request: web.Request) -> web.Response:
    return web.json_response(await request.app[NODE].explain_checkpoint(request.match_info["instance"]))


@routes.get("/v1/logs/{target}")
async def _logs(request: web.Request) -> web.StreamResponse:
    node, target = request.app[NODE], request.match_info["target"]
    path = node.lifecycle.roster.log_of(target)
    instance = node.lifecycle.instances.get(path.parent.name)
    response = web.StreamResponse(headers={"content-type": "application/octet-stream"})
    await response.prepare(request)
    wanted = "follow" in request.query
    with contextlib.suppress(ConnectionError):  # the reader has read enough
        async for piece in follow(path, ended=instance.ended if instance and wanted else None):
            await response.write(piece)
    return response


@routes.get("/v1/apps")
async def _apps(request: web.Request) -> web.Response:
    return web.json_response(request.app[NODE].apps())


@routes.delete("/v1/apps/{app}")
async def _remove_app(request: web.Request) -> web.Response:
    left = await request.app[NODE].remove_app(request.match_info["app"])
    return web.json_response({"removed": request.match_info["app"], "reason": left})


@routes.get("/v1/checkpoints")
async def _checkpoints(request: web.Request) -> web.Response:
    return web.json_response(await asyncio.to_thread(request.app[NODE].checkpoints))


@routes.get("/v1/checkpoints/{checkpoint}")
async def _checkpoint(request: web.Request) -> web.Response:
    return web.json_response(await request.app[NODE].checkpoint(request.match_info["checkpoint"]))


@routes.post("/v1/checkpoints/{checkpoint}/verify")
async def _verify(request: web.Request) -> web.Response:
    node = request.app[NODE]
    return web.json_response(
        await asyncio.to_thread(node.verify_checkpoint, request.match_info["checkpoint"])
    )


@routes.delete("/v1/checkpoints/{checkpoint}")
async def _remove_checkpoint(request: web.Request) -> web.Response:
    await asyncio.to_thread(request.app[NODE].remove_checkpoint, request.match_info["checkpoint"])
    return web.json_response({"removed": request.match_info["checkpoint"]})


@routes.post("/v1/checkpoints/{checkpoint}/pull")
async def _pull(request: web.Request) -> web.Response:
    node, checkpoint = request.app[NODE], request.match_info["checkpoint"]
    return web.json_response(await asyncio.to_thread(node.region.copies.pull, checkpoint))


@routes.post("/v1/checkpoints/{checkpoint}/export")
async def _export(request: web.Request) -> web.Response:
    node, checkpoint = request.app[NODE], request.match_info["checkpoint"]
    file = await _file(request)
    return web.json_response(await asyncio.to_thread(node.region.catalogue.export, checkpoint, file))


@routes.post("/v1/region/import")
async def _import(request: web.Request) -> web.Response:
    file = await _file(request)
    return web.json_response(await asyncio.to_thread(request.app[NODE].region.catalogue.import_, file))


@routes.post("/v1/region/gc")
async def _collect(request: web.Request) -> web.Response:
    delete = bool((await _body(request)).get("delete"))
    node = request.app[NODE]
    return web.json_response(await asyncio.to_thread(lambda: node.region.catalogue.collect(delete=delete)))


async def _file(request: web.Request) -> Path:
    file = (await _body(request)).get("file")
    if not isinstance(file, str) or not Path(file).is_absolute():
        raise BadRequest("file is not an absolute path")
    return Path(file)


@routes.get("/v1/secrets/{app}")
async def _secrets(request: web.Request) -> web.Response:
    return web.json_response(sorted(request.app[NODE].secrets(request.match_info["app"]).all()))


@routes.put("/v1/secrets/{app}")
async def _set_secrets(request: web.Request) -> web.Response:
    body = await _body(request)
    if not all(isinstance(value, str) for value in body.values()):
        raise BadRequest("secrets map names to strings")
    request.app[NODE].secrets(request.match_info["app"]).set(body)
    return web.json_response(sorted(body))


@routes.delete("/v1/secrets/{app}")
async def _remove_secret(request: web.Request) -> web.Response:
    key = request.query.get("key", "")
    if not request.app[NODE].secrets(request.match_info["app"]).remove(key):
        raise NotFound(f"no secret {key!r}", hint="relume secrets list APP shows the names")
    return web.json_response({"removed": key})
