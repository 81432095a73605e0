import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.security.SecureRandom;
import java.util.HexFormat;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.Executors;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicLong;

/** A server on the JDK's own HTTP classes, with a pool, a scheduled task and a warm map. Nobody asks for a checkpoint. */
public final class Server {
    public static void main(String[] arguments) throws Exception {
        byte[] random = new byte[16];
        new SecureRandom().nextBytes(random);
        String token = HexFormat.of().formatHex(random);
        ConcurrentHashMap<Integer, String> map = new ConcurrentHashMap<>();
        for (int n = 0; n < 200_000; n++) map.put(n, "row " + n);
        AtomicLong ticks = new AtomicLong();
        Executors.newScheduledThreadPool(1).scheduleAtFixedRate(ticks::incrementAndGet, 0, 20, TimeUnit.MILLISECONDS);
        HttpServer server = HttpServer.create(new InetSocketAddress(8000), 0);
        server.setExecutor(Executors.newFixedThreadPool(4));
        server.createContext("/", exchange -> {
            byte[] body = ("{\"token\": \"" + token + "\", \"ticks\": " + ticks + ", \"rows\": " + map.size() + "}").getBytes();
            exchange.sendResponseHeaders(200, body.length);
            exchange.getResponseBody().write(body);
            exchange.close();
        });
        server.start();
    }
}
