// What a JavaScript application does with the server: text about a picture, a stream, an object, a function.
import { generateObject, generateText, streamText, tool } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { z } from "zod";
import { readFileSync } from "node:fs";

const [url, picture] = process.argv.slice(2);
const baseURL = url + "/v1";
const provider = createOpenAICompatible({ name: "seavlm", baseURL, supportsStructuredOutputs: true, includeUsage: true });
const model = provider("nano");
const content = [{ type: "image", image: readFileSync(picture) }, { type: "text", text: "ນີ້ແມ່ນຫຍັງ?" }];
const seen = await generateText({ model, temperature: 0, maxOutputTokens: 20, messages: [{ role: "user", content }] });
const stream = streamText({ model, temperature: 0, maxOutputTokens: 20, messages: [{ role: "user", content }] });
let streamed = "";
for await (const part of stream.textStream) streamed += part;
const schema = z.object({ name: z.string().max(6), legs: z.number().int().min(0).max(99) });
const { object } = await generateObject({ model, temperature: 1, maxOutputTokens: 300, schema, prompt: "x" });
const weather = tool({
  description: "The weather of a city",
  inputSchema: z.object({ city: z.string().max(8) }),
  execute: async ({ city }) => "31 C in " + city,
});
const called = await generateText({
  model, temperature: 1, maxOutputTokens: 300, prompt: "weather?",
  tools: { weather }, toolChoice: { type: "tool", toolName: "weather" },
});
console.log(JSON.stringify({
  seen: seen.text, streamed, usage: await stream.usage, object,
  calls: called.toolCalls.map(one => [one.toolName, one.input]), results: called.toolResults.length,
}));
