// k6: unary calls and streams of a scheduler, each user asking again as soon as it was answered.
//
//   k6 run -e ADDRESS=127.0.0.1:50051 -e USERS=8 -e SECONDS=30 -e TOKENS=32 tests/clients/load.js
//
// It fails when a call does, or when a stream has a gap, a repeat or no end.
import { check } from 'k6';
import { Counter, Trend } from 'k6/metrics';
import grpc from 'k6/net/grpc';

const address = __ENV.ADDRESS || '127.0.0.1:50051';
const users = Number(__ENV.USERS || 4);
const seconds = Number(__ENV.SECONDS || 5);
const maxTokens = Number(__ENV.TOKENS || 16);

const tokens = new Counter('output_tokens');
const firstToken = new Trend('time_to_first_token', true);
const wholeAnswer = new Trend('unary_answer', true);
const wholeStream = new Trend('streamed_answer', true);

export const options = {
  scenarios: {
    unary: { executor: 'constant-vus', exec: 'unary', vus: users, duration: `${seconds}s` },
    streams: { executor: 'constant-vus', exec: 'streams', vus: users, duration: `${seconds}s` },
  },
  thresholds: { checks: ['rate==1'] },
};

const client = new grpc.Client();
client.load(['../../protos'], 'inference.proto');
const method = 'pagewire.v1.InferenceService';
let isConnected = false;

// Each user has its own connection, which stays.
function connect() {
  if (!isConnected) client.connect(address, { plaintext: true });
  isConnected = true;
}

function asked() {
  return {
    text: `The sea, seen by ${__VU} for the time ${__ITER}, is`,
    sampling: { temperature: 0 },
    stopping: { max_tokens: maxTokens, ignore_eos: true },
  };
}

export function unary() {
  connect();
  const began = Date.now();
  const answer = client.invoke(`${method}/Generate`, asked());
  const isOk = check(answer, {
    'unary: OK': ({ status }) => status === grpc.StatusOK,
    'unary: all tokens': ({ message }) => message && message.choices[0].tokenIds.length === maxTokens,
  });
  if (!isOk) return;
  wholeAnswer.add(Date.now() - began);
  tokens.add(maxTokens);
}

export function streams() {
  connect();
  const began = Date.now();
  const stream = new grpc.Stream(client, `${method}/GenerateStream`);
  const heard = { tokens: 0, isInOrder: true, end: '', error: '' };
  stream.on('data', ({ delta, finish }) => {
    if (delta) {
      if (!heard.tokens) firstToken.add(Date.now() - began);
      heard.isInOrder = heard.isInOrder && (delta.index || 0) === heard.tokens;
      heard.tokens += delta.tokenIds.length;
    }
    if (finish) heard.end = finish.reason;
  });
  stream.on('error', (error) => {
    heard.error = `${error.code}: ${error.message}`;
  });
  stream.on('end', () => {
    const isOk = check(heard, {
      'stream: no error': ({ error }) => !error,
      'stream: neither gap nor repeat': ({ isInOrder }) => isInOrder,
      'stream: all tokens': (h) => h.tokens === maxTokens,
      'stream: ended': ({ end }) => end === 'FINISH_REASON_LENGTH',
    });
    if (!isOk) return;
    wholeStream.add(Date.now() - began);
    tokens.add(heard.tokens);
  });
  stream.write(asked());
  stream.end();
}
