// A gRPC server and a gRPC client with grpc-go's own xDS, for the tests of the control plane.
//
//	grpc-peer serve ADDRESS NAME [--plain]   answers echo.Echo/Say and /Other until its input ends
//	grpc-peer call TARGET                    takes orders on its input, a JSON object a line, and answers each with one
//
// Messages are bytes as they are: no generated code.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	xdscredentials "google.golang.org/grpc/credentials/xds"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/xds"

	_ "google.golang.org/grpc/balancer/leastrequest"
)

const service = "echo.Echo"

// raw is a codec for messages that are bytes.
type raw struct{}

func (raw) Name() string { return "raw" }

func (raw) Marshal(message any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(*message.(*[]byte))}, nil
}

func (raw) Unmarshal(data mem.BufferSlice, message any) error {
	*message.(*[]byte) = data.Materialize()
	return nil
}

// answer is what a server saw of a call.
type answer struct {
	Server   string  `json:"server"`
	Caller   string  `json:"caller"`
	Attempts string  `json:"attempts"`
	Deadline float64 `json:"deadline"` // seconds that are left; 0 without one
}

type server struct{ name string }

// say answers with what was seen of the call; with the status that `fail` names, always or on the server that
// `fail-on` names; after the time that `wait` names, as Go writes durations.
func (s server) say(ctx context.Context) ([]byte, error) {
	told, _ := metadata.FromIncomingContext(ctx)
	first := func(name string) string {
		if values := told.Get(name); len(values) > 0 {
			return values[0]
		}
		return ""
	}
	seen := answer{Server: s.name, Caller: caller(ctx), Attempts: first("grpc-previous-rpc-attempts")}
	if until, ok := ctx.Deadline(); ok {
		seen.Deadline = time.Until(until).Seconds()
	}
	if on := first("fail-on"); first("fail") != "" && (on == "" || on == s.name) {
		if before := first("fail-before"); before == "" || seen.Attempts < before {
			var code codes.Code
			if err := code.UnmarshalJSON([]byte(`"` + first("fail") + `"`)); err != nil {
				return nil, status.Error(codes.InvalidArgument, err.Error())
			}
			return nil, status.Error(code, "as was asked for")
		}
	}
	if wait := first("wait"); wait != "" {
		pause, err := time.ParseDuration(wait)
		if err != nil {
			return nil, status.Error(codes.InvalidArgument, err.Error())
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
	}
	return json.Marshal(seen)
}

// caller is the SPIFFE ID in the certificate of whoever calls, or "nobody".
func caller(ctx context.Context) string {
	if from, ok := peer.FromContext(ctx); ok {
		if tls, ok := from.AuthInfo.(credentials.TLSInfo); ok {
			for _, certificate := range tls.State.PeerCertificates[:1] {
				for _, uri := range certificate.URIs {
					return uri.String()
				}
			}
		}
	}
	return "nobody"
}

func (s server) handle(_ any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
	var request []byte
	if err := decode(&request); err != nil {
		return nil, err
	}
	reply, err := s.say(ctx)
	return &reply, err
}

func serve(address, name string, plain bool) error {
	methods := &grpc.ServiceDesc{ServiceName: service, HandlerType: (*any)(nil)}
	for _, method := range []string{"Say", "Other"} {
		methods.Methods = append(methods.Methods, grpc.MethodDesc{MethodName: method, Handler: server{name}.handle})
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	var running interface {
		grpc.ServiceRegistrar
		Serve(net.Listener) error
		Stop()
	}
	if plain {
		running = grpc.NewServer(grpc.ForceServerCodecV2(raw{}))
	} else {
		// Plaintext is what it falls back to where the control plane sends no TLS: so nothing may rest on it.
		fallback := xdscredentials.ServerOptions{FallbackCreds: insecure.NewCredentials()}
		both, err := xdscredentials.NewServerCredentials(fallback)
		if err != nil {
			return err
		}
		if running, err = xds.NewGRPCServer(grpc.Creds(both), grpc.ForceServerCodecV2(raw{})); err != nil {
			return err
		}
	}
	running.RegisterService(methods, server{name})
	go func() {
		io.Copy(io.Discard, os.Stdin)
		running.Stop()
	}()
	fmt.Println(listener.Addr())
	return running.Serve(listener)
}

// order is what a client is to do: `Count` calls, so many of them at once.
type order struct {
	Method   string            `json:"method"`
	Metadata map[string]string `json:"metadata"`
	Timeout  float64           `json:"timeout"`
	Count    int               `json:"count"`
	AtOnce   int               `json:"at_once"`
}

// outcome is what became of one call.
type outcome struct {
	answer
	Code    string  `json:"code"`
	Message string  `json:"message"`
	Seconds float64 `json:"seconds"`
}

func call(target string) error {
	channel, err := xdscredentials.NewClientCredentials(xdscredentials.ClientOptions{FallbackCreds: insecure.NewCredentials()})
	if err != nil {
		return err
	}
	connection, err := grpc.NewClient("xds:///"+target,
		grpc.WithTransportCredentials(channel), grpc.WithDefaultCallOptions(grpc.ForceCodecV2(raw{})), grpc.WithNoProxy())
	if err != nil {
		return err
	}
	defer connection.Close()
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		given := order{Method: "Say", Timeout: 20, Count: 1, AtOnce: 1}
		if err := json.Unmarshal(lines.Bytes(), &given); err != nil {
			return err
		}
		line, err := json.Marshal(carryOut(connection, given))
		if err != nil {
			return err
		}
		fmt.Println(string(line))
	}
	return lines.Err()
}

func carryOut(connection *grpc.ClientConn, given order) []outcome {
	outcomes := make([]outcome, given.Count)
	turns := make(chan int)
	var all sync.WaitGroup
	for range given.AtOnce {
		all.Go(func() {
			for turn := range turns {
				outcomes[turn] = one(connection, given)
			}
		})
	}
	for turn := range given.Count {
		turns <- turn
	}
	close(turns)
	all.Wait()
	return outcomes
}

func one(connection *grpc.ClientConn, given order) outcome {
	ctx := metadata.NewOutgoingContext(context.Background(), metadata.New(given.Metadata))
	if given.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(given.Timeout*float64(time.Second)))
		defer cancel()
	}
	var request, reply []byte
	begun := time.Now()
	err := connection.Invoke(ctx, "/"+service+"/"+given.Method, &request, &reply)
	found := outcome{Code: status.Code(err).String(), Message: status.Convert(err).Message(), Seconds: time.Since(begun).Seconds()}
	if err == nil {
		err = json.Unmarshal(reply, &found.answer)
		if err != nil {
			found.Message = err.Error()
		}
	}
	return found
}

func main() {
	log.SetFlags(0)
	words := os.Args[1:]
	var err error
	switch {
	case len(words) >= 3 && words[0] == "serve":
		err = serve(words[1], words[2], strings.Join(words[3:], " ") == "--plain")
	case len(words) == 2 && words[0] == "call":
		err = call(words[1])
	default:
		err = fmt.Errorf("usage: grpc-peer serve ADDRESS NAME [--plain] | grpc-peer call TARGET")
	}
	if err != nil {
		log.Fatal(err)
	}
}
