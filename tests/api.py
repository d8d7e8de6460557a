"""A server that speaks the OpenAI-compatible protocol, for real, on a port of this machine; told to misbehave."""

import contextlib
import gzip
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-secret-0123456789"


class Server(ThreadingHTTPServer):
    """Answers with a hash of what it was asked; judges prefer the answer that holds more of the letter e."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        """How often each request's messages were answered."""
        self.trouble: list[str] = []
        """What befalls the next requests, one each: 429, wait, 500, cut, junk, slow, filter, html, gzip, thoughts."""
        self.refuses_log_probabilities = 400
        """Status code with which log-probabilities are refused, if `log_probabilities` is false."""
        self.dies_after: int | None = None
        """From so many answers on, everything is a 500."""
        self.log_probabilities, self.slow = True, 0.0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        if self._known():
            self._send(200, {"data": [{"id": "m"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._known():
            return
        server = self.server
        with server.lock:
            trouble = server.trouble.pop(0) if server.trouble else ""
            if server.dies_after is not None and sum(server.asked.values()) >= server.dies_after:
                trouble = "500"
        time.sleep(server.slow)
        if trouble == "429":
            self._send(429, {"error": {"message": f"slow down, {KEY}"}}, {"Retry-After": "0"})
        elif trouble == "wait":
            self._send(429, {"error": {"message": "come back in an hour"}}, {"Retry-After": "3600"})
        elif trouble == "filter":
            error = {"code": "content_filter", "message": "The prompt triggered our content management policy."}
            self._send(400, {"error": error})
        elif trouble == "html":
            self._write(200, b"<!doctype html><title>Sign in</title>")
        elif trouble == "gzip":
            self._write(200, gzip.compress(json.dumps(self._answer(body)).encode()))
        elif trouble == "thoughts":
            message = {"role": "assistant", "content": None, "reasoning_content": "(A) or (B)?"}
            self._send(200, {"choices": [{"finish_reason": "length", "message": message}], "usage": "a lot"})
        elif trouble == "500":
            self._send(500, {"error": {"message": f"no luck with {self.headers['Authorization']}"}})
        elif trouble == "cut":
            self._send(200, self._answer(body), cut=20)
        elif trouble == "junk":
            self._send(200, {"choices": []})
        elif body.get("logprobs") and not server.log_probabilities:
            self._send(server.refuses_log_probabilities, {"error": {"message": "logprobs are not supported"}})
        else:
            with server.lock:
                server.asked[json.dumps(body["messages"])] += 1
            if trouble == "slow":
                time.sleep(2)
            self._send(200, self._answer(body))

    def _known(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {KEY}":
            return True
        given = (self.headers.get("Authorization") or "none").removeprefix("Bearer ")
        self._send(401, {"error": {"message": f"Incorrect API key provided: {given}"}})
        return False

    def _answer(self, body) -> dict:
        last = body["messages"][-1]["content"]
        usage = {"prompt_tokens": 10, "completion_tokens": 4}
        choice = {"finish_reason": "stop", "message": {"role": "assistant"}}
        if "Options:" not in last:
            choice["message"]["content"] = f"I can help you with {len(last)} letters."
        else:
            a, b = last.split("(A) ")[1].split("(B) ")[:2]
            letter = "A" if a.count("e") >= b.count("e") else "B"
            choice["message"]["content"] = f"({letter})"
            if body.get("logprobs"):
                top = [{"token": t, "logprob": -0.2 if t == letter else -1.8} for t in "AB"]
                content = [{"token": "(", "logprob": 0.0, "top_logprobs": []}]
                choice["logprobs"] = {"content": [*content, {"token": letter, "logprob": -0.2, "top_logprobs": top}]}
        return {"choices": [choice], "usage": usage}

    def _send(self, code, body, headers=(), cut=0):
        self._write(code, json.dumps(body).encode(), headers, cut)

    def _write(self, code, text, headers=(), cut=0):
        self.send_response(code)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # who asked has given up
            self.wfile.write(text[: len(text) - cut])
