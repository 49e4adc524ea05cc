# frozen_string_literal: true

# Stream a chat answer from Ruby, with the gem `grpc` and what protoc makes of protos/inference.proto.
#
#   ruby -I lib stream.rb 127.0.0.1:50051 "Why is the sky blue?"
#
# Ctrl-C cancels the call, and the server frees its memory within a step. The stubs, in a folder `lib` beside this file:
#
#   protoc -I../../protos --ruby_out=lib --grpc_out=lib --plugin=protoc-gen-grpc="$(command -v grpc_ruby_plugin)" \
#     inference.proto
require 'google/protobuf/well_known_types'
require 'google/rpc/error_details_pb'
require 'google/rpc/status_pb'
require 'grpc'
require 'inference_services_pb'

address, prompt = ARGV
address ||= '127.0.0.1:50051'
prompt ||= 'Why is the sky blue?'

include Pagewire::V1

# What a refusal says beside its text: which field is wrong, or when there may be room.
def tell_details(refusal)
  encoded = refusal.metadata['grpc-status-details-bin'] or return
  Google::Rpc::Status.decode(encoded).details.each do |detail|
    if detail.is(Google::Rpc::BadRequest)
      detail.unpack(Google::Rpc::BadRequest).field_violations.each { |violation| warn "  in #{violation.field}" }
    elsif detail.is(Google::Rpc::RetryInfo)
      delay = detail.unpack(Google::Rpc::RetryInfo).retry_delay
      warn "  try again in #{delay.seconds * 1000 + delay.nanos / 1_000_000} ms"
    end
  end
end

NAMES = GRPC::Core::StatusCodes.constants.to_h { |name| [GRPC::Core::StatusCodes.const_get(name), name] }

stub = InferenceService::Stub.new(address, :this_channel_is_insecure, timeout: 120) # seconds for the whole answer
request = GenerateStreamRequest.new(
  chat: ChatMessages.new(messages: [ChatMessage.new(role: 'user', content: prompt)]),
  sampling: SamplingParams.new(temperature: 0.7, top_p: 0.95),
  stopping: StopConditions.new(max_tokens: 256)
)
call = stub.generate_stream(request, return_op: true)
trap('INT') { Thread.new { call.cancel } } # a handler may not wait, a thread may

begin
  $stdout.sync = true
  call.execute.each do |message|
    case message.event
    when :delta then print message.delta.text
    when :finish
      usage = message.finish.usage
      puts "\n[#{message.finish.reason}: #{usage.prompt_tokens} + #{usage.completion_tokens} tokens]"
    end
  end
rescue GRPC::Cancelled
  puts "\n[cancelled]"
  exit 130
rescue GRPC::BadStatus => e
  warn "#{NAMES[e.code]}: #{e.details}"
  tell_details(e)
  exit 1
end
