package main

import (
	"bytes"
	"cmp"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// ---- the map of the tenants' heads -----------------------------------------------------------------------------------

// A branch of the sparse Merkle tree over SHA-256(tenant): a leaf has no sides.
type branch struct {
	sides [2]*branch
	key   [32]byte
	hash  [32]byte
	leaf  bool
}

type tenantMap struct {
	top   *branch
	heads map[string]map[string]head
}

func (m *tenantMap) move(log string, heads map[string]head) {
	for tenant, h := range heads {
		if m.heads[tenant] == nil {
			m.heads[tenant] = map[string]head{}
		}
		m.heads[tenant][log] = h
		var listed []string
		for name, of := range m.heads[tenant] {
			listed = append(listed, fmt.Sprintf(`["%s",%d,"%s"]`, name, of.count, of.leaf))
		}
		sort.Strings(listed)
		leaf := &branch{key: sha256.Sum256([]byte(tenant)), leaf: true}
		leaf.hash = sha256.Sum256(slices.Concat([]byte{2}, leaf.key[:], []byte("["+strings.Join(listed, ",")+"]")))
		m.top = m.top.put(leaf, 0)
	}
}

func (b *branch) put(leaf *branch, depth int) *branch {
	if b == nil || b.leaf && b.key == leaf.key {
		return leaf
	}
	if b.leaf {
		inner := &branch{}
		inner.sides[bit(b.key, depth)] = b
		b = inner
	}
	side := bit(leaf.key, depth)
	b.sides[side] = b.sides[side].put(leaf, depth+1)
	left, right := b.sides[0].root(), b.sides[1].root()
	b.hash = sha256.Sum256(slices.Concat([]byte{3}, left[:], right[:]))
	return b
}

func (b *branch) root() [32]byte {
	if b == nil {
		return [32]byte{}
	}
	return b.hash
}

func bit(key [32]byte, depth int) int { return int(key[depth/8]>>(7-depth%8)) & 1 }

// ---- the root log ----------------------------------------------------------------------------------------------------

type shard struct {
	log  string
	size int64
	root string
}

type heads struct {
	seq     int64
	shards  []shard
	tenants string
}

type rootLog struct {
	origin, previous string
	t, epoch         int64
	tree             tree
	newest           map[string]shard
	heads            []heads
	later            int
	complete         bool // whether every entry was readable
}

var rootKinds = map[string]kind{"heads": {map[string]check{"epoch": uint53, "full": boolean, "kind": oneOf("heads"),
	"shards": list(isShard, bundle), "tenants": hex64, "v": version}, []string{"epoch", "full", "shards", "tenants"}},
	"recover": {map[string]check{"appr": approvals, "epoch": uint53, "full": boolean, "kind": oneOf("recover"),
		"recovers": isRecovery, "shards": list(isShard, 0), "tenants": oneOf(zero), "v": version},
		[]string{"appr", "epoch", "full", "recovers", "shards", "tenants"}}}

func approvals(v value) bool {
	listed, ok := v.([]value)
	names := map[value]bool{}
	for _, item := range listed {
		pair, is := item.([]value)
		if !is || len(pair) != 2 || !code(pair[0]) || !evenHex(pair[1]) || names[pair[0]] {
			return false
		}
		names[pair[0]] = true
	}
	return ok && len(listed) >= 2 && len(listed) <= 16
}

func isRecovery(v value) bool {
	told, ok := v.(object)
	lost, _ := told.get("lost").([]value)
	return ok && len(told) == 8 && long(told.get("anchor"), 1024) && long(told.get("anchored"), 8192) &&
		uint53(told.get("asked")) && uuid(told.get("installation")) && len(lost) == 2 && uint53(lost[0]) && uint53(lost[1]) &&
		logName(told.get("origin")) && logName(told.get("predecessor")) && rootOfLog(told.get("stands"))
}

func long(v value, most int) bool {
	s, _ := v.(string)
	return s != "" && utf8.RuneCountInString(s) <= most
}

var generation = regexp.MustCompile(`^(.*/audit)(?:/g([1-9][0-9]{0,8}))?$`)

// begins checks the first entry of a generation after the first: it says what was lost; no other entry does.
func (r *rootLog) begins(record object, seq int64, where string) *bad {
	later := generation.FindStringSubmatch(r.origin)
	recovers := record.text("kind") == "recover"
	if recovers != (seq == 0 && later != nil && later[2] != "") {
		return fail("E_SCHEMA", where, "a generation after the first begins with a recover entry, nothing else is one")
	}
	if !recovers {
		return nil
	}
	told := record.get("recovers").(object)
	before := generation.FindStringSubmatch(told.text("predecessor"))
	if before == nil || told.text("origin") != r.origin {
		return fail("E_ORIGIN", where, "opens %s after %s", told.text("origin"), told.text("predecessor"))
	}
	number, err := strconv.Atoi(cmp.Or(before[2], "1"))
	if err != nil || fmt.Sprintf("%s/g%d", before[1], number+1) != r.origin {
		return fail("E_ORIGIN", where, "opens %s after %s", r.origin, told.text("predecessor"))
	}
	return nil
}

func isShard(v value) bool {
	s, ok := v.([]value)
	if !ok || len(s) != 3 {
		return false
	}
	name, is := s[0].(string)
	size, _ := s[1].(int64)
	return is && isLog(name) && size > 0 && hex64(s[2])
}

func (r *rootLog) check(entry []byte) *bad {
	where := fmt.Sprintf("%s/%d", r.origin, r.tree.n)
	f, problem := parseFrame(entry)
	if problem != "" {
		return fail(problem, where, "not an entry of this format")
	}
	if problem := linked(f, r.origin, r.tree.n, r.t, r.previous); problem != nil {
		return problem
	}
	if f.tenant {
		return fail("E_SCHEMA", where, "an entry of the root log belongs to no tenant")
	}
	record, later, problem := parse(f.body, rootKinds, []string{"kind", "v"})
	if problem != "" {
		return fail(problem, where, "not the canonical bytes of an entry of the root log")
	}
	leaf, seq := tlog.RecordHash(entry), r.tree.n
	r.tree.push(leaf)
	r.previous, r.t = hex.EncodeToString(leaf[:]), f.t
	if later {
		r.later++
		return nil
	}
	if problem := r.begins(record, seq, where); problem != nil {
		return problem
	}
	if epoch := record.number("epoch"); epoch < r.epoch {
		return fail("E_EPOCH", where, "epoch %d after epoch %d", epoch, r.epoch)
	} else {
		r.epoch = epoch
	}
	found := heads{seq: seq, tenants: record.text("tenants")}
	for _, v := range record.get("shards").([]value) {
		s := v.([]value)
		found.shards = append(found.shards, shard{s[0].(string), s[1].(int64), s[2].(string)})
	}
	if problem := r.shards(found.shards, record.get("full") == true, where); problem != nil {
		return problem
	}
	r.heads = append(r.heads, found)
	return nil
}

var chainName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,127}$`)

func (r *rootLog) shards(listed []shard, full bool, where string) *bad {
	names := map[string]bool{}
	for i, s := range listed {
		if i > 0 && s.log <= listed[i-1].log {
			return fail("E_SCHEMA", where, "the chains are not listed once each and in order")
		}
		names[s.log] = true
	}
	for _, s := range listed {
		name, ours := strings.CutPrefix(s.log, r.origin+"/")
		if !ours || !chainName.MatchString(name) {
			return fail("E_ORIGIN", where, "%s is no chain of this log", s.log)
		}
		before, known := r.newest[s.log]
		if known && s.size < before.size {
			return fail("E_ROOTSEQ", where, "%s shrinks from %d to %d records", s.log, before.size, s.size)
		}
		if known && s.size == before.size && s.root != before.root {
			return fail("E_FORK", where, "%s has another root than before at %d records", s.log, s.size)
		}
	}
	for log := range r.newest {
		if full && !names[log] && len(r.newest) <= bundle {
			return fail("E_ROOTSEQ", where, "an entry that lists every chain omits %s", log)
		}
	}
	for _, s := range listed {
		r.newest[s.log] = s
	}
	return nil
}

// storedSize is how many entries the root log's bundles hold: their names say it.
func storedSize(directory, log string) (int64, *bad) {
	var full int64
	for isFile(filepath.Join(directory, bundlePath(full, bundle))) {
		full++
	}
	partial := 0
	listed, _ := os.ReadDir(filepath.Dir(filepath.Join(directory, bundlePath(full, 1))))
	for _, entry := range listed {
		w, err := strconv.Atoi(entry.Name())
		if err != nil || strconv.Itoa(w) != entry.Name() || w < 1 || w > 999 {
			continue
		}
		if w >= bundle {
			return 0, fail("E_SCHEMA", fmt.Sprintf("%s/%d", log, full*bundle), "a partial bundle of 256 entries or more")
		}
		partial = max(partial, w)
	}
	return full*bundle + int64(partial), nil
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

// ---- signed notes ----------------------------------------------------------------------------------------------------

// A signer of the kinds that sumdb's note does not know: ECDSA P-256 and cosignature/v1, both as C2SP signed-note has them.
type signer struct {
	name     string
	hash     uint32
	key      publicKey
	cosigner bool
}

func (s *signer) Name() string    { return s.name }
func (s *signer) KeyHash() uint32 { return s.hash }
func (s *signer) Verify(message, signature []byte) bool {
	if !s.cosigner {
		return verifies(s.key, message, signature)
	}
	if len(signature) != 72 || signature[0]&0x80 != 0 {
		return false
	}
	seconds := binary.BigEndian.Uint64(signature)
	return verifies(s.key, append(fmt.Appendf(nil, "cosignature/v1\ntime %d\n", seconds), message...), signature[8:])
}

// The SubjectPublicKeyInfo of an Ed25519 key and of an uncompressed P-256 point are these bytes, then the key.
var (
	ed25519SPKI = []byte("\x30\x2a\x30\x05\x06\x03\x2b\x65\x70\x03\x21\x00")
	p256SPKI    = []byte("\x30\x59\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x03\x42\x00")
)

func logVerifier(origin string, spki []byte) (note.Verifier, publicKey, error) {
	if raw, is := bytes.CutPrefix(spki, ed25519SPKI); is && len(raw) == 32 {
		vkey, err := note.NewEd25519VerifierKey(origin, raw)
		if err != nil {
			return nil, nil, err
		}
		verifier, err := note.NewVerifier(vkey)
		return verifier, ed25519.PublicKey(raw), err
	}
	if raw, is := bytes.CutPrefix(spki, p256SPKI); is {
		key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), raw)
		sum := sha256.Sum256(spki)
		return &signer{origin, binary.BigEndian.Uint32(sum[:4]), key, false}, key, err
	}
	return nil, nil, errors.New("a trusted key is neither Ed25519 nor ECDSA P-256 (SubjectPublicKeyInfo)")
}

func parseVkey(vkey string) (note.Verifier, error) {
	parts := strings.SplitN(vkey, "+", 3)
	if len(parts) != 3 {
		return nil, errors.New("not a verifier key: name+id+key")
	}
	raw, err := base64.StdEncoding.DecodeString(parts[2])
	if err != nil || len(raw) != 33 || base64.StdEncoding.EncodeToString(raw) != parts[2] {
		return nil, errors.New("a verifier key of another type than Ed25519 or cosignature/v1")
	}
	if raw[0] == 1 {
		return note.NewVerifier(vkey)
	}
	sum := sha256.Sum256(slices.Concat([]byte(parts[0]+"\n"), raw))
	if raw[0] != 4 || parts[0] == "" || strings.ContainsAny(parts[0], " \t\n") || hex.EncodeToString(sum[:4]) != parts[1] {
		return nil, errors.New("a verifier key of another type, or whose id is not that of its key")
	}
	return &signer{parts[0], binary.BigEndian.Uint32(sum[:4]), ed25519.PublicKey(raw[1:]), true}, nil
}

type checkpoint struct {
	size      int64
	root      tlog.Hash
	witnesses map[string]bool
}

var checkpointText = regexp.MustCompile(`^([^\n]+)\n(0|[1-9][0-9]{0,15})\n([A-Za-z0-9+/]{43}=)\n$`)

func openCheckpoint(data []byte, t *trust) (*checkpoint, error) {
	verifiers := slices.Clone(t.logKeys)
	for _, w := range t.witnesses {
		verifiers = append(verifiers, w)
	}
	if len(data) > 1_000_000 {
		return nil, errors.New("a note of more than 1,000,000 bytes")
	}
	opened, err := note.Open(data, note.VerifierList(verifiers...))
	if err != nil {
		return nil, err
	}
	if err := strictly(data, opened.Text, verifiers); err != nil {
		return nil, err
	}
	signed := func(v note.Verifier) bool {
		return slices.ContainsFunc(opened.Sigs, func(s note.Signature) bool { return s.Name == v.Name() && s.Hash == v.KeyHash() })
	}
	if !slices.ContainsFunc(t.logKeys, signed) {
		return nil, errors.New("no signature of a trusted audit key")
	}
	parts := checkpointText.FindStringSubmatch(opened.Text)
	if parts == nil {
		return nil, errors.New("a checkpoint is three lines: origin, size, root")
	}
	if parts[1] != t.origin {
		return nil, fmt.Errorf("a checkpoint of %s, not of %s", parts[1], t.origin)
	}
	found := &checkpoint{witnesses: map[string]bool{}}
	root, err := base64.StdEncoding.DecodeString(parts[3])
	if err != nil || base64.StdEncoding.EncodeToString(root) != parts[3] {
		return nil, errors.New("the root is not the canonical base64")
	}
	copy(found.root[:], root)
	if found.size, err = strconv.ParseInt(parts[2], 10, 64); err != nil || found.size > maxInt {
		return nil, errors.New("a tree size beyond 2^53")
	}
	for name, w := range t.witnesses {
		found.witnesses[name] = signed(w)
	}
	return found, nil
}

// strictly refuses what note.Open lets pass: other spellings of base64, and a false second signature of a key.
func strictly(data []byte, text string, verifiers []note.Verifier) error {
	lines := strings.Split(strings.TrimSuffix(string(data[len(text)+1:]), "\n"), "\n")
	if len(lines) > 64 {
		return errors.New("more than 64 signatures")
	}
	for _, line := range lines {
		name, encoded, _ := strings.Cut(strings.TrimPrefix(line, "\u2014 "), " ")
		raw, err := base64.StdEncoding.DecodeString(encoded)
		if err != nil || len(raw) < 5 || base64.StdEncoding.EncodeToString(raw) != encoded {
			return fmt.Errorf("the signature of %s is not canonical base64", name)
		}
		for _, v := range verifiers {
			known := v.Name() == name && v.KeyHash() == binary.BigEndian.Uint32(raw)
			if known && !v.Verify([]byte(text), raw[4:]) {
				return fmt.Errorf("the signature of %s is false", name)
			}
		}
	}
	return nil
}

// noteIn is the note in a line of checkpoints.jsonl.
func noteIn(line []byte) ([]byte, bool) {
	row, problem := canonical(line)
	_, at := row.get("at").(int64)
	text, is := row.get("note").(string)
	good := problem == "" && at && is && len(row) == 2
	if len(row) == 3 {
		_, token := row.get("tst").(string)
		good = problem == "" && at && is && token
	}
	return []byte(text), good
}

// readCheckpoints opens every signed note in order of size, and holds it against the root log.
func (e *export) readCheckpoints(r *rootLog) *bad {
	data, problem := e.read("checkpoints.jsonl")
	if problem != nil {
		return problem
	}
	copied, problem := e.read("checkpoint")
	if problem != nil {
		return problem
	}
	newest, last := &checkpoint{size: -1}, []byte(nil)
	for number := 0; len(data) > 0; number++ {
		where := fmt.Sprintf("%s/checkpoints.jsonl %d", r.origin, number)
		line, rest, whole := bytes.Cut(data, []byte("\n"))
		text, good := noteIn(line)
		if !good || !whole {
			return fail("E_CANON", where, "not a line of checkpoints.jsonl")
		}
		found, err := openCheckpoint(text, e.trust)
		if err != nil {
			return fail("E_SIG", where, "%v", err)
		}
		if found.size <= newest.size {
			return fail("E_SEQ", where, "a checkpoint of %d after one of %d", found.size, newest.size)
		}
		if problem := r.hold(found, "E_ROOT"); problem != nil {
			return problem
		}
		newest, last, data = found, text, rest
	}
	if !bytes.Equal(copied, last) {
		return fail("E_DERIVED", r.origin+"/checkpoint", "not the newest note of checkpoints.jsonl")
	}
	if e.held != nil {
		e.report.anchored = true
		if problem := r.hold(e.held, "E_FORK"); problem != nil {
			return problem
		}
	}
	if e.trust.quorum != nil && !e.trust.quorum(newest.witnesses) {
		where := fmt.Sprintf("%s/%d", r.origin, max(newest.size, 0))
		return fail("E_WITNESS", where, "the newest checkpoint lacks its quorum of witnesses")
	}
	return nil
}

func (r *rootLog) hold(found *checkpoint, code string) *bad {
	if found.size > r.tree.n {
		if r.complete {
			return fail("E_TRUNC", fmt.Sprintf("%s/%d", r.origin, r.tree.n), "a checkpoint of %d entries was signed", found.size)
		}
		return nil
	}
	if r.tree.root(found.size) != found.root {
		return fail(code, fmt.Sprintf("%s/%d", r.origin, found.size), "a checkpoint of another root was signed")
	}
	return nil
}
