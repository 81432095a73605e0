# A preforking server in core Perl: three children accept on one socket, and count in a file under a lock.
use strict;
use warnings;
use Fcntl qw(:flock SEEK_SET);
use HTTP::Tiny;
use IO::Handle;
use IO::Socket::INET;

open my $random, '<', '/dev/urandom' or die $!;
read $random, my $bytes, 16;
my $token = unpack 'H*', $bytes;
my %table = map { $_ => "row $_" } 1 .. 100_000;
open my $count, '+>', '/tmp/count' or die $!;
print $count "0\n";
$count->flush;
my $listener = IO::Socket::INET->new(LocalAddr => '0.0.0.0', LocalPort => 8000, Listen => 16, ReuseAddr => 1) or die $!;

sub serve {
    while (1) {
        my $client = $listener->accept or next;
        next unless <$client>;    # somebody looked whether the port is open
        while (my $line = <$client>) { last if $line =~ /^\r?$/ }
        open my $own, '+<', "/proc/self/fd/" . fileno($count) or die $!;
        flock $own, LOCK_EX;
        my $n = <$own> + 1;
        seek $own, 0, SEEK_SET;
        print $own "$n\n";
        $own->flush;
        flock $own, LOCK_UN;
        my $body = sprintf '{"token": "%s", "count": %d, "row": "%s", "pid": %d}', $token, $n, $table{100_000}, $$;
        print $client "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: " . length($body) . "\r\n\r\n$body";
        close $client;
    }
}

my @children;
for (1 .. 3) {
    my $pid = fork;
    serve() if $pid == 0;
    push @children, $pid;
}
my $answer = HTTP::Tiny->new(timeout => 300, proxy => undef, http_proxy => undef, all_proxy => undef)
    ->post('http://169.254.169.253:8234/checkpoint');
STDOUT->autoflush(1);
print "$answer->{status} $answer->{content}\n";
waitpid $_, 0 for @children;
