"""Errors of routes, and of what is no route, as answers in the form of the OpenAI API."""

from __future__ import annotations

from logging import getLogger

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from serve.schema import RequestError, error_body

logger = getLogger("ray.serve")

#: That there are routes for.
_METHODS = ("GET", "HEAD", "POST", "DELETE")


def answer_errors(app: FastAPI) -> None:
    """Have the application answer with them."""
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(SQLAlchemyError, _no_database)
    app.add_exception_handler(Exception, _broken)


async def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestError)
    headers = dict(error.headers)
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    body = error_body(error.status, error.message, param=error.param, code=error.code)
    return JSONResponse(body, status_code=error.status, headers=headers)


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    """A body or query that does not fit the schema: the first field that is wrong."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return JSONResponse(error_body(400, "the body is not valid JSON", code="invalid_json"), status_code=400)
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    code = {"extra_forbidden": "unknown_field", "missing": "missing_field"}.get(first["type"], "invalid_value")
    message = "unknown field" if code == "unknown_field" else first["msg"].removeprefix("Value error, ")
    text = f"{param}: {message}" if param else message
    return JSONResponse(error_body(400, text, param=param, code=code), status_code=400)


async def _no_route(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:  # Starlette names the methods of the first route alone
        headers["Allow"] = ", ".join(method for method in _METHODS if _has_route(request, method))
    return JSONResponse(
        error_body(error.status_code, str(error.detail)), status_code=error.status_code, headers=headers
    )


def _has_route(request: Request, method: str) -> bool:
    scope = {**request.scope, "method": method}
    return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)


async def _no_database(_: Request, error: Exception) -> JSONResponse:
    logger.error("the database failed a request", exc_info=error)
    body = error_body(503, "the service cannot reach its database: try again", code="unavailable")
    return JSONResponse(body, status_code=503, headers={"Retry-After": "5"})


async def _broken(_: Request, error: Exception) -> JSONResponse:
    # the error itself is in the log; a client gets no path and no traceback
    return JSONResponse(error_body(500, "internal error", code="internal_error"), status_code=500)
