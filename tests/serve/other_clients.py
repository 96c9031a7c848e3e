"""LangChain and Instructor against a server: run by `test_clients.py` in an environment of their own."""

import sys

import instructor
import openai
import pydantic
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

url, picture = sys.argv[1] + "/v1", sys.argv[2]


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=6)
    age: int = pydantic.Field(ge=0, le=99)


@tool
def tall(centimetres: int) -> bool:
    """Whether somebody is tall."""
    return centimetres > 180


model = ChatOpenAI(base_url=url, api_key="x", model="nano", max_tokens=300, temperature=0)
content = [{"type": "text", "text": "Apa ini?"}, {"type": "image_url", "image_url": {"url": picture}}]
reply = model.invoke([("user", content)])
assert reply.content and reply.usage_metadata["total_tokens"] > 0, reply
assert "".join(part.content for part in model.stream([("user", content)])) == reply.content
for method in ("json_schema", "function_calling"):
    found = model.with_structured_output(Person, method=method).invoke("someone", temperature=1, seed=2)
    assert isinstance(found, Person), (method, found)
(call,) = model.bind_tools([tall], tool_choice="tall").invoke("x", temperature=1, seed=2).tool_calls or [None]
assert call is None or call["name"] == "tall", call  # digits without end are cut off by max_tokens

client = instructor.from_openai(openai.OpenAI(base_url=url, api_key="x"), mode=instructor.Mode.JSON_SCHEMA)
found = client.chat.completions.create(
    model="nano",
    response_model=Person,
    messages=[{"role": "user", "content": "someone"}],
    max_tokens=300,
    temperature=1,
    seed=2,
    max_retries=0,
)
assert isinstance(found, Person), found
