// OpenAI's client for Node asks a gateway what stands in its input, and prints what it was told as JSON.
import { readFileSync } from 'node:fs';
import OpenAI from 'openai';

const { baseURL, asked } = JSON.parse(readFileSync(0, 'utf8'));
const client = new OpenAI({ baseURL, apiKey: 'any', maxRetries: 0 });

const joined = async (stream, textOf) => {
  let text = '';
  for await (const event of stream) text += textOf(event) ?? '';
  return text;
};
const scores = (choice) => choice.logprobs.content.map((token) => token.logprob);
const calls = (message) => (message.tool_calls ?? []).map((call) => [call.function.name, call.function.arguments]);
const called = (response) =>
  response.output.filter((item) => item.type === 'function_call').map((item) => [item.name, item.arguments]);

const chat = await client.chat.completions.create(asked.chat);
const completion = await client.completions.create(asked.completion);
const formed = await client.chat.completions.create(asked.formed);
const tools = await client.chat.completions.stream(asked.tools).finalChatCompletion();
const response = await client.responses.create(asked.response);
const refused = await client.chat.completions.create({ ...asked.chat, model: 'gpt-4o' }).catch((error) => error);

console.log(
  JSON.stringify({
    chat: [chat.choices[0].message.content, chat.choices[0].finish_reason, chat.usage.completion_tokens],
    chat_scores: scores(chat.choices[0]),
    chat_streamed: await joined(
      await client.chat.completions.create({ ...asked.chat, stream: true }),
      (chunk) => chunk.choices[0]?.delta.content,
    ),
    completion: [completion.choices[0].text, completion.choices[0].finish_reason],
    completion_scores: completion.choices[0].logprobs.token_logprobs,
    completion_streamed: await joined(
      await client.completions.create({ ...asked.completion, stream: true }),
      (chunk) => chunk.choices[0]?.text,
    ),
    formed: JSON.parse(formed.choices[0].message.content),
    tools: calls(tools.choices[0].message),
    response: response.output_text,
    response_streamed: await joined(
      await client.responses.create({ ...asked.response, stream: true }),
      (event) => (event.type === 'response.output_text.delta' ? event.delta : ''),
    ),
    response_tools: called(await client.responses.stream(asked.response_tools).finalResponse()),
    refused: [refused.status, refused.code, refused.param],
    models: (await client.models.list()).data.map((model) => model.id),
  }),
);
