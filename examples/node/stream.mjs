// Stream a chat answer from Node.js. No generated code: the .proto file is read when the program starts.
//
//   cd examples/node && npm ci
//   node stream.mjs 127.0.0.1:50051 "Why is the sky blue?"
import { fileURLToPath } from 'node:url';
import grpc from '@grpc/grpc-js';
import { loadSync } from '@grpc/proto-loader';
import { detailsOf } from './details.mjs';

const [address = '127.0.0.1:50051', prompt = 'Why is the sky blue?'] = process.argv.slice(2);

const proto = fileURLToPath(new URL('../../protos/inference.proto', import.meta.url));
// 64-bit numbers as strings, enums by name, unset numbers as 0, and `event` naming which of the oneof is set
const definition = loadSync(proto, { longs: String, enums: String, defaults: true, oneofs: true });
const { InferenceService } = grpc.loadPackageDefinition(definition).pagewire.v1;

const client = new InferenceService(address, grpc.credentials.createInsecure());
const request = {
  chat: { messages: [{ role: 'user', content: prompt }] },
  sampling: { temperature: 0.7, topP: 0.95 },
  stopping: { maxTokens: 256 },
};
const call = client.generateStream(request, { deadline: Date.now() + 120_000 });
process.once('SIGINT', () => call.cancel()); // the server frees its memory within a step

try {
  for await (const { event, delta, finish } of call) {
    if (event === 'delta') process.stdout.write(delta.text);
    if (event === 'finish') {
      const { promptTokens, completionTokens } = finish.usage;
      console.log(`\n[${finish.reason}: ${promptTokens} + ${completionTokens} tokens]`);
    }
  }
} catch (error) {
  console.error(`\n${grpc.status[error.code] ?? 'ERROR'}: ${error.details ?? error.message}`);
  for (const { fields, retryMs } of detailsOf(error)) {
    for (const field of fields) console.error(`  in ${field}`);
    if (retryMs !== undefined) console.error(`  try again in ${retryMs} ms`);
  }
  process.exitCode = error.code === grpc.status.CANCELLED ? 130 : 1;
} finally {
  client.close();
}
