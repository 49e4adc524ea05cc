// Stream a chat answer from Go, with gRPC and what protoc makes of protos/inference.proto.
//
//	go run ./stream.go 127.0.0.1:50051 "Why is the sky blue?"
//
// Ctrl-C cancels the call, and the server frees its memory within a step. The stubs, in a folder `pb` beside this file:
//
//	protoc -I../../protos --go_out=pb --go-grpc_out=pb --go_opt=paths=source_relative --go-grpc_opt=paths=source_relative \
//	  --go_opt=Minference.proto=pagewire.example/pb --go-grpc_opt=Minference.proto=pagewire.example/pb inference.proto
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"pagewire.example/pb"
)

func main() {
	address, prompt := "127.0.0.1:50051", "Why is the sky blue?"
	if len(os.Args) > 1 {
		address = os.Args[1]
	}
	if len(os.Args) > 2 {
		prompt = os.Args[2]
	}
	err := stream(address, prompt)
	if err != nil {
		os.Exit(explain(err))
	}
}

// stream prints the answer as it comes, then what it cost.
func stream(address, prompt string) error {
	channel, err := grpc.Dial(address, grpc.WithInsecure()) // where there is TLS: grpc.WithTransportCredentials
	if err != nil {
		return err
	}
	defer channel.Close()
	interrupted, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	ctx, cancel := context.WithTimeout(interrupted, 120*time.Second) // for the whole answer
	defer cancel()

	temperature, topP, maxTokens := float32(0.7), float32(0.95), uint32(256)
	messages := []*pb.ChatMessage{{Role: "user", Content: prompt}}
	call, err := pb.NewInferenceServiceClient(channel).GenerateStream(ctx, &pb.GenerateStreamRequest{
		Input:    &pb.GenerateStreamRequest_Chat{Chat: &pb.ChatMessages{Messages: messages}},
		Sampling: &pb.SamplingParams{Temperature: &temperature, TopP: &topP},
		Stopping: &pb.StopConditions{MaxTokens: &maxTokens},
	}, grpc.ForceCodec(codec{}))
	if err != nil {
		return err
	}
	for {
		message, err := call.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if delta := message.GetDelta(); delta != nil {
			fmt.Print(delta.Text)
		}
		if finish := message.GetFinish(); finish != nil {
			usage := finish.Usage
			fmt.Printf("\n[%s: %d + %d tokens]\n", finish.Reason, usage.PromptTokens, usage.CompletionTokens)
		}
	}
}

// codec is for distributions (Debian 12) whose gRPC still marshals by the older protobuf package; elsewhere it changes
// nothing.
type codec struct{}

func (codec) Name() string { return "proto" }

func (codec) Marshal(message interface{}) ([]byte, error) {
	return proto.Marshal(message.(proto.Message))
}

func (codec) Unmarshal(data []byte, message interface{}) error {
	return proto.Unmarshal(data, message.(proto.Message))
}

// explain tells how a call failed, which field is wrong or when to come back, and returns the exit code.
func explain(err error) int {
	refusal := status.Convert(err)
	if refusal.Code() == codes.Canceled {
		fmt.Println("\n[cancelled]")
		return 130
	}
	fmt.Fprintf(os.Stderr, "%s: %s\n", name(refusal.Code()), refusal.Message())
	for _, detail := range refusal.Details() {
		switch detail := detail.(type) {
		case *errdetails.BadRequest:
			for _, violation := range detail.FieldViolations {
				fmt.Fprintf(os.Stderr, "  in %s\n", violation.Field)
			}
		case *errdetails.RetryInfo:
			delay := detail.RetryDelay
			fmt.Fprintf(os.Stderr, "  try again in %d ms\n", delay.Seconds*1000+int64(delay.Nanos)/1000000)
		}
	}
	return 1
}

// name is what all other languages call a code.
func name(code codes.Code) string {
	switch code {
	case codes.InvalidArgument:
		return "INVALID_ARGUMENT"
	case codes.ResourceExhausted:
		return "RESOURCE_EXHAUSTED"
	case codes.Unavailable:
		return "UNAVAILABLE"
	case codes.DeadlineExceeded:
		return "DEADLINE_EXCEEDED"
	default:
		return code.String()
	}
}
