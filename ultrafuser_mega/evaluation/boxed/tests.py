"""The trusted side: runs a benchmark's tests against a function whose calls are answered by another sandbox."""

import builtins
import json
import os
import pickle


def main():
    result = os.fdopen(os.dup(2), "w", encoding="utf-8")
    channel = Channel()  # noqa: F821  of frames.py, which stands before this
    task = channel.receive()  # written before the program was started

    def say(passed, reason=""):
        json.dump({"passed": passed, "reason": reason}, result)
        result.flush()
        os._exit(0)

    def ask(value):
        channel.send(value)
        try:
            return channel.receive()
        except EOFError:
            say(False, "the program ended before its answer")
        except Exception as error:  # what an untrusted side may send
            say(False, f"no plain value came back: {error}")

    def candidate(*arguments, **named):
        try:
            pickle.dumps((arguments, named))
        except Exception as error:
            say(False, f"the tests give what is no plain data: {error}")
        answer = ask((arguments, named))
        if isinstance(answer, tuple) and len(answer) == 2 and answer[0] == "value":
            return answer[1]
        if isinstance(answer, tuple) and len(answer) == 3 and answer[0] == "raised":
            kind = getattr(builtins, str(answer[1]), None)
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                kind = Exception
            try:
                error = kind(answer[2])
            except Exception:  # it wants more than a text
                error = Exception(answer[2])
            raise error
        say(False, "no plain value came back")

    answer = ask((task["program"], task["entry_point"]))
    if answer != ("ready",):
        failed = isinstance(answer, tuple) and len(answer) == 3
        say(False, f"{answer[1]}: {answer[2]}" if failed else "the program does not say that it is there")
    try:
        space = {"__name__": "tests"}
        exec(compile(task["setup"], "setup", "exec"), space)
        space[task["entry_point"]] = candidate
        exec(compile(task["tests"], "tests", "exec"), space)
        space["check"](candidate)
    except AssertionError as error:
        say(False, f"wrong answer {error}".strip()[:300])
    except BaseException as error:
        say(False, f"{type(error).__name__}: {error}"[:300])
    say(True)


main()
