// Stream a chat answer from C++, with gRPC and what protoc makes of protos/inference.proto.
//
//   cd examples/cpp && make && ./stream 127.0.0.1:50051 "Why is the sky blue?"
//
// Ctrl-C cancels the call, and the server frees its memory within a step.
#include <atomic>
#include <chrono>
#include <csignal>
#include <iostream>
#include <memory>
#include <string>
#include <thread>

#include <grpcpp/grpcpp.h>

#include "details.pb.h"
#include "inference.grpc.pb.h"

namespace pb = pagewire::v1;

namespace {

// What all languages call the codes that a server may answer with.
std::string NameOf(grpc::StatusCode code) {
  switch (code) {
    case grpc::StatusCode::INVALID_ARGUMENT: return "INVALID_ARGUMENT";
    case grpc::StatusCode::RESOURCE_EXHAUSTED: return "RESOURCE_EXHAUSTED";
    case grpc::StatusCode::UNAVAILABLE: return "UNAVAILABLE";
    case grpc::StatusCode::DEADLINE_EXCEEDED: return "DEADLINE_EXCEEDED";
    case grpc::StatusCode::UNAUTHENTICATED: return "UNAUTHENTICATED";
    default: return "code " + std::to_string(code);
  }
}

// How a call failed, which field is wrong, or when to come back.
void Explain(const grpc::Status& refusal) {
  std::cerr << NameOf(refusal.error_code()) << ": " << refusal.error_message() << "\n";
  example::Status status;
  if (!status.ParseFromString(refusal.error_details())) return;
  for (const auto& detail : status.details()) {
    example::BadRequest bad;
    example::RetryInfo retry;
    if (detail.type_url() == "type.googleapis.com/google.rpc.BadRequest" && bad.ParseFromString(detail.value())) {
      for (const auto& violation : bad.field_violations()) std::cerr << "  in " << violation.field() << "\n";
    }
    if (detail.type_url() == "type.googleapis.com/google.rpc.RetryInfo" && retry.ParseFromString(detail.value())) {
      const auto& delay = retry.retry_delay();
      std::cerr << "  try again in " << delay.seconds() * 1000 + delay.nanos() / 1000000 << " ms\n";
    }
  }
}

// Waits for Ctrl-C in a thread of its own, where anything may be called, and cancels the call.
class CancelsOnInterrupt {
 public:
  explicit CancelsOnInterrupt(grpc::ClientContext& context) : waiting_([this, &context] { Wait(context); }) {}
  ~CancelsOnInterrupt() {
    is_over_ = true;
    waiting_.join();
  }

 private:
  void Wait(grpc::ClientContext& context) {
    sigset_t interrupt;
    sigemptyset(&interrupt);
    sigaddset(&interrupt, SIGINT);
    const timespec a_moment{0, 20'000'000};
    while (!is_over_) {
      if (sigtimedwait(&interrupt, nullptr, &a_moment) == SIGINT) return context.TryCancel();
    }
  }

  std::atomic<bool> is_over_{false};
  std::thread waiting_;
};

}  // namespace

int main(int count, char** arguments) {
  const std::string address = count > 1 ? arguments[1] : "127.0.0.1:50051";
  const std::string prompt = count > 2 ? arguments[2] : "Why is the sky blue?";
  sigset_t interrupt;  // no thread takes it but the one that waits for it
  sigemptyset(&interrupt);
  sigaddset(&interrupt, SIGINT);
  sigprocmask(SIG_BLOCK, &interrupt, nullptr);

  pb::GenerateStreamRequest request;
  auto* message = request.mutable_chat()->add_messages();
  message->set_role("user");
  message->set_content(prompt);
  request.mutable_sampling()->set_temperature(0.7f);
  request.mutable_sampling()->set_top_p(0.95f);
  request.mutable_stopping()->set_max_tokens(256);

  const auto stub =
      pb::InferenceService::NewStub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(120));  // for the whole answer
  const auto call = stub->GenerateStream(&context, request);
  const CancelsOnInterrupt cancels(context);
  pb::GenerateStreamResponse told;
  while (call->Read(&told)) {
    if (told.has_delta()) std::cout << told.delta().text() << std::flush;
    if (told.has_finish()) {
      const auto& usage = told.finish().usage();
      std::cout << "\n[" << pb::FinishReason_Name(told.finish().reason()) << ": " << usage.prompt_tokens() << " + "
                << usage.completion_tokens() << " tokens]" << std::endl;
    }
  }
  const grpc::Status status = call->Finish();
  if (status.error_code() == grpc::StatusCode::CANCELLED) {
    std::cout << "\n[cancelled]" << std::endl;
    return 130;
  }
  if (!status.ok()) Explain(status);
  return status.ok() ? 0 : 1;
}
