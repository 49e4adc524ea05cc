// What a refusal says beside its text: which field is wrong, or when there may be room. It is a google.rpc.Status in the
// trailers; these are the parts of google/rpc/status.proto and google/rpc/error_details.proto that are read here.
import protobuf from 'protobufjs';

const { root } = protobuf.parse(`
  syntax = "proto3";
  message Any { string type_url = 1; bytes value = 2; }
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message FieldViolation { string field = 1; string description = 2; }
  message BadRequest { repeated FieldViolation field_violations = 1; }
  message Duration { int64 seconds = 1; int32 nanos = 2; }
  message RetryInfo { Duration retry_delay = 1; }
`);
const [Status, BadRequest, RetryInfo] = ['Status', 'BadRequest', 'RetryInfo'].map((name) => root.lookupType(name));

/** The details of an error of a call: `fields` that are wrong, and `retryMs`, where the server says when to come back. */
export function detailsOf(error) {
  const [status] = error.metadata?.get('grpc-status-details-bin') ?? [];
  if (!status) return [];
  return Status.decode(status).details.map(({ typeUrl, value }) => {
    if (typeUrl.endsWith('/google.rpc.BadRequest')) {
      return { fields: BadRequest.decode(value).fieldViolations.map(({ field }) => field) };
    }
    if (typeUrl.endsWith('/google.rpc.RetryInfo')) {
      const { seconds, nanos } = RetryInfo.decode(value).retryDelay;
      return { fields: [], retryMs: Number(seconds) * 1000 + nanos / 1e6 };
    }
    return { fields: [] };
  });
}
